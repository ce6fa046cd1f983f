// One 256-bit register of fp32 values: what rows_vector.h and attention_vector.h are written in. Included by files
// that are compiled for AVX2 and FMA alone.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "pow2.h"

namespace baton {
namespace {

struct Vec {
  using Reg = __m256;
  static constexpr int kWidth = 8;

  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* out, Reg x) { _mm256_storeu_ps(out, x); }
  static void stream(float* out, Reg x) { _mm256_stream_ps(out, x); }  // past the caches; `out` begins a line
  static Reg load_first(const float* x, int n) { return _mm256_maskload_ps(x, first(n)); }
  static void store_first(float* out, Reg x, int n) { _mm256_maskstore_ps(out, first(n), x); }

  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }  // NaN if b is
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }  // NaN if b is
  static Reg mul_add(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg abs(Reg x) { return _mm256_andnot_ps(set(-0.0f), x); }
  static Reg round(Reg x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n, n whole; 0 where n is below the least exponent.
  static Reg scale(Reg x, Reg n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const Reg scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
    return _mm256_andnot_ps(_mm256_cmp_ps(n, set(kLeastPow2), _CMP_LT_OQ), scaled);
  }

  static float sum(Reg x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static float greatest(Reg x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  // As integers, magnitudes keep their order and a NaN is the greatest.
  static Reg greater_magnitude(Reg most, Reg x) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(most), _mm256_castps_si256(abs(x))));
  }
  static float greatest_magnitude(Reg most) {
    const __m256i bits = _mm256_castps_si256(most);
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0b01001110));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0b10110001));
    return _mm_cvtss_f32(_mm_castsi128_ps(half));
  }
  static bool any_above(Reg x, Reg bound) { return _mm256_movemask_ps(_mm256_cmp_ps(x, bound, _CMP_GT_OQ)) != 0; }
  // Lanes from n on become `other`.
  static Reg keep_first(Reg x, int n, float other) {
    return n >= kWidth ? x : _mm256_blendv_ps(set(other), x, _mm256_castsi256_ps(first(n)));
  }

  static Reg load_bf16(const uint16_t* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Reg load_int8(const int8_t* x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
  }
  static void store_bf16(uint16_t* out, Reg x) {  // nearest, ties to even; a NaN stays one
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
  }
  static void store_int8(int8_t* out, Reg x) {  // nearest whole number
    const __m256i whole = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
  }

  // rows[i] lane j <-> rows[j] lane i, of 32-bit lanes.
  static void transpose(Reg (&rows)[kWidth]) {
    Reg part[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
      part[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      part[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
      rows[i] = _mm256_shuffle_ps(part[i], part[i + 2], 0x44);
      rows[i + 1] = _mm256_shuffle_ps(part[i], part[i + 2], 0xee);
      rows[i + 2] = _mm256_shuffle_ps(part[i + 1], part[i + 3], 0x44);
      rows[i + 3] = _mm256_shuffle_ps(part[i + 1], part[i + 3], 0xee);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
      part[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
      part[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) rows[i] = part[i];
  }
};

}  // namespace
}  // namespace baton
