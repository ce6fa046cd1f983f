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

// Where one panel's columns of y lie.
struct Columns {
  float* y;
  int64_t stride;
  __mmask16 mask;
  bool accumulate;

  Columns(const LinearTask& task, int panel) : stride(task.y_stride), accumulate(task.accumulate) {
    const int count = task.w->n - panel * kPanel;
    y = task.y + (panel - task.y_panel) * kPanel;
    mask = count >= kPanel ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
  }
  float* at(int row) const { return y + row * stride; }
  void put(int row, __m512 value) const {
    if (accumulate) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at(row)), value);
    _mm512_mask_storeu_ps(at(row), mask, value);
  }
};

// Arrays of this type stay in registers; GCC 12 also writes arrays of __m512i to memory whenever an element changes.
typedef int Ints __attribute__((vector_size(64)));

// From the sum of a row and a panel to the product: nothing to do, or the scales of int8.
struct PlainFactors {
  using Sum = __m512;

  PlainFactors(const LinearTask&, const uint8_t*) {}
  __m512 product(Sum sum, int) const { return sum; }
};

struct Int8Factors {
  using Sum = Ints;
  __m512 scales;
  const float* x_scales;
  const int32_t* totals;

  Int8Factors(const LinearTask& task, const uint8_t* panel)
      : scales(_mm512_load_ps(panel + padded(task.w->k) * kPanel)), x_scales(task.x.scales), totals(task.x.totals) {}
  __m512 product(Sum sum, int row) const {
    const __m512i dot = _mm512_sub_epi32((__m512i)sum, _mm512_set1_epi32(kInt8Zero * totals[row]));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(_mm512_set1_ps(x_scales[row]), scales));
  }
};

// What the integers of one int4 group and panel mean.
struct Int4Scales {
  __m512 scales, minimums;

  explicit Int4Scales(const uint8_t* group) {
    const __m256i* last = reinterpret_cast<const __m256i*>(group + 4 * kLineBytes);
    scales = _mm512_cvtph_ps(_mm256_load_si256(last));
    minimums = _mm512_cvtph_ps(_mm256_load_si256(last + 1));
  }
  // The total of a row, and the group's dot product with it; `scale` and `sum` are the row's in this group.
  __m512 add(__m512 total, __m512i dot, float scale, float sum) const {
    total = _mm512_fmadd_ps(scales, _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scale)), total);
    return _mm512_fnmadd_ps(minimums, _mm512_set1_ps(sum), total);
  }
};

// Weights of one int4 group and panel.
struct Int4Group {
  Ints quads[8];  // quad q: unsigned weights of k = 4 q ... 4 q + 3

  explicit Int4Group(const uint8_t* group) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int line = 0; line < 4; ++line) {
      const __m512i both = _mm512_load_si512(group + line * kLineBytes);
      quads[2 * line] = (Ints)_mm512_and_si512(both, low);
      quads[2 * line + 1] = (Ints)_mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
  }
};

}  // namespace
}  // namespace baton
