// Tiles of AMX as attention uses them: loading, storing and multiplying, and rows rearranged into what they want.
// Include vector_avx512.h first.
#pragma once
#include <cstdint>

#define BATON_INLINE inline __attribute__((always_inline))

namespace baton {
namespace {

using Reg = Vec::Reg;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler's own operations take no number from a template, and GCC's loads do not say
// that they read memory.
template <int kTile>
void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
void store_tile(void* to, int64_t stride = 64) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kSums, int kA, int kB>
void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
}

// Rows of two keys as rows of pairs: lane i of the result holds lane i of both.
inline __m512i pair_up(Reg first, Reg second) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

// Eight dims of 32 tokens, from rows of values to rows of dims: out + i * 64 gets dim i of all tokens.
inline void transpose_dims(const uint16_t* const* rows, int dim, uint8_t* out) {
  __m512i a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // quarter q holds token 8 q + i
    const auto part = [&](int quarter) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[8 * quarter + i] + dim));
    };
    a[i] = _mm512_castsi128_si512(part(0));
    a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x00f0, part(1));
    a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x0f00, part(2));
    a[i] = _mm512_mask_broadcast_i32x4(a[i], 0xf000, part(3));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_epi16(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi16(a[i], a[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm512_unpacklo_epi32(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi32(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi32(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi32(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    _mm512_store_si512(out + 128 * i, _mm512_unpacklo_epi64(a[i], a[i + 4]));
    _mm512_store_si512(out + 128 * i + 64, _mm512_unpackhi_epi64(a[i], a[i + 4]));
  }
}

}  // namespace
}  // namespace baton
