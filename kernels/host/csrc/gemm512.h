// What matrix products with AVX-512 and with AMX share. Included by those two files alone, whose compiler flags know
// these registers; in an anonymous namespace, so that each has its own.
#pragma once
// The compiler's own header reads undefined registers on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "pack.h"

namespace baton {
namespace {

// y[row, 16 columns of the panel] (+)= value.
inline void put(const LinearTask& task, int panel, int row, __m512 value) {
  float* y = task.y + static_cast<int64_t>(row) * task.y_stride + panel * kPanel;
  const int columns = task.w->n - panel * kPanel;
  const __mmask16 mask = columns >= kPanel ? 0xffff : static_cast<__mmask16>((1u << columns) - 1);
  if (task.accumulate) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), value);
  _mm512_mask_storeu_ps(y, mask, value);
}

// The product of one row and an int8 panel, from the sum of unsigned weights times activations.
inline __m512 int8_product(__m512i sum, const LinearTask& task, const uint8_t* panel, int row) {
  const int groups = task.x.stride / kGroup;
  const int32_t* sums = task.x.sums + static_cast<int64_t>(row) * groups;
  int32_t total = 0;
  for (int group = 0; group < groups; ++group) total += sums[group];
  const __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(kInt8Zero * total)));
  const __m512 scales = _mm512_load_ps(panel + padded(task.w->k) * kPanel);
  return _mm512_mul_ps(dot, _mm512_mul_ps(_mm512_set1_ps(task.x.scales[row]), scales));
}

// What the integers of one int4 group and panel mean.
struct Int4Scales {
  __m512 scales, minimums;

  explicit Int4Scales(const uint8_t* group) {
    const __m256i* last = reinterpret_cast<const __m256i*>(group + 4 * kLineBytes);
    scales = _mm512_cvtph_ps(_mm256_load_si256(last));
    minimums = _mm512_cvtph_ps(_mm256_load_si256(last + 1));
  }
  // The total of a row, and the group's dot product with it; `sum` is that of the row's activations in the group.
  __m512 add(__m512 total, __m512i dot, int32_t sum) const {
    total = _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(dot), total);
    return _mm512_fnmadd_ps(minimums, _mm512_cvtepi32_ps(_mm512_set1_epi32(sum)), total);
  }
};

// Weights of one int4 group and panel.
struct Int4Group {
  __m512i quads[8];  // quad q: unsigned weights of k = 4 q ... 4 q + 3

  explicit Int4Group(const uint8_t* group) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int line = 0; line < 4; ++line) {
      const __m512i both = _mm512_load_si512(group + line * kLineBytes);
      quads[2 * line] = _mm512_and_si512(both, low);
      quads[2 * line + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
  }
};

}  // namespace
}  // namespace baton
