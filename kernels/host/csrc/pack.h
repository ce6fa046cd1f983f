// How a packed weight matrix W [n, k] lies in memory. Columns of the product (rows of W) come in panels of kPanel = 16;
// the last panel is padded with zeros. k is padded with zeros to K = padded(k). Panel p starts at p * panel_bytes.
//
//   fp32  [K][16]             one cache line per k
//   bf16  [K / 2][16][2]      one cache line per pair of k: sixteen lines are one AMX B tile, one line a vdpbf16ps
//   int8  [K / 4][16][4]      signed; then [16] int32 sums over k of each column (for u8 x s8 products that add 128)
//   int4  per group of 32 k: [4][64] bytes, byte b of line j holds, for column b / 4 and i = b % 4, k = 8 j + i in its
//         low half and k = 8 j + 4 + i in its high half; unsigned 0..15. Then, for all groups, [K / 32][16] fp32 scales
//         and [K / 32][16] fp32 minimums: w = q * scale - minimum.
#pragma once
#include <cstdint>

#include "isa.h"

namespace baton {

int64_t panel_bytes(int format, int k);
inline int num_panels(int n) { return (n + kPanel - 1) / kPanel; }

}  // namespace baton
