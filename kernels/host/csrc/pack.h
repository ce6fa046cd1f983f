// How a packed weight matrix W [n, k] lies in memory. Columns of the product (rows of W) come in panels of kPanel = 16;
// the last panel is padded with zeros. k is padded with zeros to K = padded(k). Panel p starts at p * panel_bytes.
//
//   fp32  [K][16]             one cache line per k
//   bf16  [K / 2][16][2]      one cache line per pair of k: sixteen lines are one AMX B tile, one line a vdpbf16ps
//   int8  [K / 4][16][4]      w / scale + 128, unsigned; then [16] fp32 scales
//   int4  [K / 32] groups of five lines. Byte b of line j < 4 holds, for column b / 4 and i = b % 4, k = 8 j + i in its
//         low half and k = 8 j + 4 + i in its high half, unsigned 0..15. The last line is [16] fp16 scales and [16]
//         fp16 minimums: w = q * scale - minimum.
//
// So one line of any format but int4 meets four bytes of an activation row. Quantised weights are unsigned and
// activations signed, because vpdpbusd multiplies just that, and takes the signed side straight from memory; sums of
// the activations (`Activations::sums`) correct for the 128 and carry the minimums.
#pragma once
#include <cstdint>

#include "isa.h"

namespace baton {

constexpr int kLineBytes = 64;
constexpr int kInt4GroupBytes = 5 * kLineBytes;
constexpr int kInt8Zero = 128;       // what an int8 weight of 0 is stored as
constexpr float kInt8Most = 127.0f;  // the greatest magnitude of a quantised value
// Rows and columns whose greatest magnitude is below this quantise to zeros: 127 / magnitude must be finite.
constexpr float kLeastMagnitude = 1e-35f;

int64_t panel_bytes(int format, int k);
static inline int num_panels(int n) { return (n + kPanel - 1) / kPanel; }

}  // namespace baton
