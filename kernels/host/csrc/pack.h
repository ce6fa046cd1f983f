// How a packed weight matrix W [n, k] lies in memory. Columns of the product (rows of W) come in panels of kPanel = 16;
// the last panel is padded with zeros. k is padded with zeros to K = padded(k). Panel p starts at p * panel_bytes.
//
//   fp32  [K][16]             one cache line per k
//   bf16  [K / 2][16][2]      one cache line per pair of k: sixteen lines are one AMX B tile, one line a vdpbf16ps
//   int8  [K / 4][16][4]      rotated w / scale + 128, unsigned; then [16] fp32 scales
//   int4  [K / 32] groups of five lines. Byte b of line j < 4 holds, for column b / 4 and i = b % 4, k = 8 j + i in its
//         low half and k = 8 j + 4 + i in its high half, unsigned 0..15. The last line is [16] fp16 scales and [16]
//         fp16 minimums: w = q * scale - minimum.
//
// So one line of any format but int4 meets four bytes of an activation row. Quantised weights are unsigned and
// activations signed, because vpdpbusd multiplies just that, and takes the signed side straight from memory; sums of
// the activations (`Activations::totals` and `sums`) correct for the 128 and carry the minimums.
//
// int8 has one scale for a whole row, of weights and of activations, so that a product is one integer sum. A few
// columns of x are a hundred times as large as the others, and a scale that fits them leaves nothing of the others.
// So both sides are rotated: each kRotated values along k are multiplied with a Hadamard matrix (all entries 1 or -1),
// which spreads what is large over all of them. The rotation of one side undoes that of the other but for a factor
// kRotated, which the weights' scale takes.
#pragma once
#include <cstdint>

#include "isa.h"

namespace baton {

constexpr int kLineBytes = 64;
constexpr int kInt4GroupBytes = 5 * kLineBytes;
constexpr int kInt8Zero = 128;       // what an int8 weight of 0 is stored as
constexpr int kRotated = 64;          // a power of 2, at most kPadK
constexpr float kInt8Most = 127.0f;  // the greatest magnitude of a quantised value
// Rows and columns whose greatest magnitude is below this quantise to zeros: 127 / magnitude must be finite.
constexpr float kLeastMagnitude = 1e-35f;

int64_t panel_bytes(int format, int k);
// out [padded(k)]: x [k] and zeros, rotated. Stages go from neighbours to values kRotated / 2 apart, here and in every
// instruction set's own, so that all round alike. `out` may be x.
void rotate(const float* x, int k, float* out);
static inline int num_panels(int n) { return (n + kPanel - 1) / kPanel; }

}  // namespace baton
