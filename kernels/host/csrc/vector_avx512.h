// One 512-bit register of fp32 values: what rows_vector.h and attention_vector.h are written in. Included by files
// that are compiled for AVX-512 alone. Only operations whose result is exactly specified: no rcp14, whose bits differ
// between vendors.
#pragma once
// The compiler's own header reads undefined registers on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

#include "pow2.h"

namespace baton {
namespace {

struct Vec {
  using Reg = __m512;
  static constexpr int kWidth = 16;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* out, Reg x) { _mm512_storeu_ps(out, x); }
  static void stream(float* out, Reg x) { _mm512_stream_ps(out, x); }  // past the caches; `out` begins a line
  static Reg load_first(const float* x, int n) { return _mm512_maskz_loadu_ps(first(n), x); }
  static void store_first(float* out, Reg x, int n) { _mm512_mask_storeu_ps(out, first(n), x); }

  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }  // NaN if b is
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }  // NaN if b is
  static Reg mul_add(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg abs(Reg x) { return _mm512_abs_ps(x); }
  static Reg round(Reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale(Reg x, Reg n) { return _mm512_scalef_ps(x, n); }  // x * 2^n, n whole

  static float sum(Reg x) { return _mm512_reduce_add_ps(x); }
  static float greatest(Reg x) { return _mm512_reduce_max_ps(x); }
  // As integers, magnitudes keep their order and a NaN is the greatest.
  static Reg greater_magnitude(Reg most, Reg x) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most), _mm512_castps_si512(abs(x))));
  }
  static float greatest_magnitude(Reg most) {
    return _mm512_cvtss_f32(
        _mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(_mm512_castps_si512(most)))));
  }
  static bool any_above(Reg x, Reg bound) { return _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ) != 0; }
  // Lanes from n on become `other`.
  static Reg keep_first(Reg x, int n, float other) {
    return n >= kWidth ? x : _mm512_mask_mov_ps(set(other), first(n > 0 ? n : 0), x);
  }

  static Reg load_bf16(const uint16_t* x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Reg load_int8(const int8_t* x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
  }
  static void store_bf16(uint16_t* out, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
  static void store_int8(int8_t* out, Reg x) {  // nearest whole number
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
  }

  // rows[i] lane j <-> rows[j] lane i, of 32-bit lanes.
  static void transpose(Reg (&rows)[kWidth]) {
    Reg part[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      part[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      part[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
      const auto pair = [&](int j) { return _mm512_castps_pd(part[i + j]); };
      rows[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(0), pair(2)));
      rows[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(0), pair(2)));
      rows[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(1), pair(3)));
      rows[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(1), pair(3)));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
      part[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
      part[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
      part[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
      part[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm512_shuffle_f32x4(part[i], part[i + 8], 0x88);
      rows[i + 8] = _mm512_shuffle_f32x4(part[i], part[i + 8], 0xdd);
      rows[i + 4] = _mm512_shuffle_f32x4(part[i + 4], part[i + 12], 0x88);
      rows[i + 12] = _mm512_shuffle_f32x4(part[i + 4], part[i + 12], 0xdd);
    }
  }
};

}  // namespace
}  // namespace baton
