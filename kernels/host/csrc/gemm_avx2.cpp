// Matrix products with AVX2 and FMA, and activations for them. The same loops as with AVX-512, on half the registers:
// a block is a few rows by one panel, whose 16 columns are two registers.
#include <immintrin.h>

#include "pack.h"
#include "parts.h"

namespace baton::avx2 {
namespace {

// kRows rows from `row` on, against one panel.
struct Block {
  const LinearTask& task;
  const uint8_t* w;
  int panel, row;

  template <typename Element>
  const Element* activations() const {
    return static_cast<const Element*>(task.x.data) + static_cast<int64_t>(row) * task.x.stride;
  }
  // int4: scale and sum of a row's group.
  float scale(int r, int group) const { return task.x.scales[first_group(r) + group]; }
  float sum(int r, int group) const { return task.x.sums[first_group(r) + group]; }
  int64_t first_group(int r) const { return static_cast<int64_t>(row + r) * (task.x.stride / kGroup); }
};

// Arrays of this type stay in registers; GCC 12 also writes arrays of __m256i to memory whenever an element changes.
typedef int Ints __attribute__((vector_size(32)));

// y[row, 16 columns of the panel] (+)= low and high.
inline void put(const Block& block, int r, __m256 low, __m256 high) {
  alignas(32) float out[kPanel];
  const LinearTask& task = block.task;
  float* y = task.y + static_cast<int64_t>(block.row + r) * task.y_stride + (block.panel - task.y_panel) * kPanel;
  const int columns = task.w->n - block.panel * kPanel;
  _mm256_store_ps(out, low);
  _mm256_store_ps(out + 8, high);
  for (int c = 0; c < kPanel && c < columns; ++c) y[c] = task.accumulate ? y[c] + out[c] : out[c];
}

struct Fp32 {
  static constexpr int kRows = 6;
  template <int kRows>
  static void multiply(const Block& block) {
    const float *w = reinterpret_cast<const float*>(block.w), *x = block.activations<float>();
    const int64_t stride = block.task.x.stride;
    __m256 sums[kRows][2] = {};
    for (int i = 0, k = padded(block.task.w->k); i < k; ++i, ++x, w += kPanel) {
      const __m256 low = _mm256_load_ps(w), high = _mm256_load_ps(w + 8);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256 one = _mm256_broadcast_ss(x + r * stride);
        sums[r][0] = _mm256_fmadd_ps(low, one, sums[r][0]);
        sums[r][1] = _mm256_fmadd_ps(high, one, sums[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) put(block, r, sums[r][0], sums[r][1]);
  }
};

inline __m256i broadcast4(const void* p) {
  int32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return _mm256_set1_epi32(bytes);
}

// The lower and the upper half of each pair of bf16, as fp32.
inline __m256 first_of_pairs(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 second_of_pairs(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

struct Bf16 {
  static constexpr int kRows = 4;
  template <int kRows>
  static void multiply(const Block& block) {
    const __m256i* w = reinterpret_cast<const __m256i*>(block.w);
    const uint16_t* x = block.activations<uint16_t>();
    const int64_t stride = block.task.x.stride;
    __m256 sums[kRows][2] = {};
    for (int i = 0, k = padded(block.task.w->k); i < k; i += 2, x += 2, w += 2) {
      const __m256i low = _mm256_load_si256(w), high = _mm256_load_si256(w + 1);
      const __m256 first[2] = {first_of_pairs(low), first_of_pairs(high)};
      const __m256 second[2] = {second_of_pairs(low), second_of_pairs(high)};
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256i pair = broadcast4(x + r * stride);
        const __m256 x_first = first_of_pairs(pair), x_second = second_of_pairs(pair);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          sums[r][h] = _mm256_fmadd_ps(first[h], x_first, sums[r][h]);
          sums[r][h] = _mm256_fmadd_ps(second[h], x_second, sums[r][h]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) put(block, r, sums[r][0], sums[r][1]);
  }
};

// Four activations as 16 bits, four times.
inline __m256i broadcast_quad(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
}

// Products of 8 bits are widened to 16 first: vpmaddubsw would saturate at 255 * 127 * 2.
struct Int8 {
  static constexpr int kRows = 2;
  template <int kRows>
  static void multiply(const Block& block) {
    const __m128i* w = reinterpret_cast<const __m128i*>(block.w);
    const int8_t* x = block.activations<int8_t>();
    const int64_t stride = block.task.x.stride;
    Ints sums[kRows][4] = {};  // for each of four columns, two partial sums side by side
    for (int i = 0, k = padded(block.task.w->k); i < k; i += 4, x += 4, w += 4) {
      Ints quads[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) quads[r] = (Ints)broadcast_quad(x + r * stride);
#pragma GCC unroll 4
      for (int quarter = 0; quarter < 4; ++quarter) {
        const __m256i weights = _mm256_cvtepu8_epi16(_mm_load_si128(w + quarter));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r][quarter] += (Ints)_mm256_madd_epi16(weights, (__m256i)quads[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      put(block, r, product(block, r, 0, sums[r][0], sums[r][1]), product(block, r, 1, sums[r][2], sums[r][3]));
  }

  // Columns 8 `half` ... 8 `half` + 7 of row r.
  static __m256 product(const Block& block, int r, int half, Ints low, Ints high) {
    const LinearTask& task = block.task;
    const float* scales = reinterpret_cast<const float*>(block.w + padded(task.w->k) * kPanel);
    const __m256i correction = _mm256_set1_epi32(kInt8Zero * task.x.totals[block.row + r]);
    const __m256 x_scale = _mm256_set1_ps(task.x.scales[block.row + r]);
    // hadd works in halves of a register: its quadwords come out as columns 0-1, 4-5, 2-3, 6-7.
    const __m256i mixed = _mm256_hadd_epi32((__m256i)low, (__m256i)high);
    const __m256i dots = _mm256_permute4x64_epi64(mixed, 0b11011000);
    const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(dots, correction));
    return _mm256_mul_ps(exact, _mm256_mul_ps(x_scale, _mm256_load_ps(scales + 8 * half)));
  }
};

struct Int4 {
  static constexpr int kRows = 2;
  template <int kRows>
  static void multiply(const Block& block) {
    __m256 totals[kRows][2] = {};
    const uint8_t* group = block.w;
    const int8_t* x = block.activations<int8_t>();
    const int64_t stride = block.task.x.stride;
    for (int g = 0; g < padded(block.task.w->k) / kGroup; ++g, group += kInt4GroupBytes) {
      const __m128i* last = reinterpret_cast<const __m128i*>(group + 4 * kLineBytes);
      for (int h = 0; h < 2; ++h) {
        const __m256 scales = _mm256_cvtph_ps(_mm_load_si128(last + h));
        const __m256 minimums = _mm256_cvtph_ps(_mm_load_si128(last + 2 + h));
        for (int r = 0; r < kRows; ++r) {
          const __m256 dots = dot(group + 32 * h, x + r * stride + g * kGroup);
          const __m256 values = _mm256_mul_ps(dots, _mm256_set1_ps(block.scale(r, g)));
          totals[r][h] = _mm256_fmadd_ps(scales, values, totals[r][h]);
          totals[r][h] = _mm256_fnmadd_ps(minimums, _mm256_set1_ps(block.sum(r, g)), totals[r][h]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) put(block, r, totals[r][0], totals[r][1]);
  }

  // Of 8 columns. 16 products of at most 15 * 128 fit 16 bits, so a group needs no widening on the way.
  static __m256 dot(const uint8_t* half_lines, const int8_t* x) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i sums = _mm256_setzero_si256();
    for (int line = 0; line < 4; ++line) {
      const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(half_lines + line * kLineBytes));
      sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(_mm256_and_si256(both, low), broadcast4(x + 8 * line)));
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(high, broadcast4(x + 8 * line + 4)));
    }
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
  }
};

// The block with the greatest number of rows, up to kRows, that is not more than `rows`. Returns that number.
template <typename Format, int kRows>
int multiply_rows(const Block& block, int rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<Format, kRows - 1>(block, rows);
  }
  Format::template multiply<kRows>(block);
  return kRows;
}

template <typename Format>
void multiply_panels(const LinearTask& task, int begin, int end) {
  const int64_t bytes = panel_bytes(task.w->format, task.w->k);
  for (int panel = begin; panel < end; ++panel)
    for (int row = 0; row < task.num_rows;) {
      const Block block{task, static_cast<const uint8_t*>(task.w->panels) + panel * bytes, panel, row};
      row += multiply_rows<Format, Format::kRows>(block, task.num_rows - row);
    }
}

// `count` of 8 values from x on, zeros after them.
inline __m256 load_some(const float* x, int count) {
  if (count >= 8) return _mm256_loadu_ps(x);
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_maskload_ps(x, mask);
}

inline int32_t sum_of(__m256i values) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0b01001110));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0b10110001)));
}

inline float greatest(__m256i bits) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0b01001110));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0b10110001));
  return _mm_cvtss_f32(_mm_castsi128_ps(four));
}

// Values in [x, x + count) that share a scale become bytes; count is a multiple of kGroup. Sets the scale, returns the
// sum of the bytes.
int32_t quantise(const float* x, int count, int8_t* to, float& scale) {
  // As integers, magnitudes keep their order and a NaN is the greatest: it reaches the scale, and so the product.
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most_bits = _mm256_setzero_si256(), sum = _mm256_setzero_si256();
  for (int i = 0; i < count; i += 8)
    most_bits = _mm256_max_epi32(most_bits, _mm256_and_si256(magnitude, _mm256_castps_si256(_mm256_loadu_ps(x + i))));
  const float most = greatest(most_bits);
  const __m256 inverse = _mm256_set1_ps(most > kLeastMagnitude ? kInt8Most / most : 0);
  for (int i = 0; i < count; i += kGroup) {
    __m256i q[4];
    for (int part = 0; part < 4; ++part) {
      q[part] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * part), inverse));
      sum = _mm256_add_epi32(sum, q[part]);
    }
    // The packs work in halves of a register: doublewords come out as 0, 2, 4, 6 | 1, 3, 5, 7.
    const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    const __m256i bytes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), bytes);
  }
  scale = most / kInt8Most;
  return sum_of(sum);
}

// Sums and differences of values 1, 2 and 4 lanes apart. Multiplying by 1 or -1 is exact: this rounds as additions do.
inline __m256 rotate_lanes(__m256 x) {
  x = _mm256_fmadd_ps(x, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(x, 0b10110001));
  x = _mm256_fmadd_ps(x, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(x, 0b01001110));
  return _mm256_fmadd_ps(x, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(x, x, 1));
}

// As `rotate` of pack.h.
void rotate(const float* x, int k, float* out) {
  constexpr int kRegisters = kRotated / 8;
  for (int i = 0; i < padded(k); i += kRotated) {
    __m256 block[kRegisters];
    for (int j = 0; j < kRegisters; ++j) block[j] = rotate_lanes(load_some(x + i + 8 * j, k - i - 8 * j));
    for (int apart = 1; apart < kRegisters; apart *= 2)
      for (int j = 0; j < kRegisters; ++j) {
        if (j & apart) continue;
        const __m256 sum = _mm256_add_ps(block[j], block[j + apart]);
        block[j + apart] = _mm256_sub_ps(block[j], block[j + apart]);
        block[j] = sum;
      }
    for (int j = 0; j < kRegisters; ++j) _mm256_storeu_ps(out + i + 8 * j, block[j]);
  }
}

void quantise_groups(const float* x, const Activations& out, int row) {
  const int64_t groups = out.stride / kGroup;
  int8_t* to = static_cast<int8_t*>(out.data) + static_cast<int64_t>(row) * out.stride;
  float *scales = out.scales + row * groups, *sums = out.sums + row * groups;
  for (int g = 0; g < groups; ++g, x += kGroup, to += kGroup) {
    const float padding[kGroup] = {};
    const int32_t sum = quantise(g < out.k / kGroup ? x : padding, kGroup, to, scales[g]);
    sums[g] = static_cast<float>(sum) * scales[g];
  }
}

// To nearest, ties to even, in the low half of each lane; a NaN stays one.
inline __m256i round_to_bf16(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}

}  // namespace

void to_activation(const float* x, const Activations& out, int row, float* room) {
  const int64_t offset = static_cast<int64_t>(row) * out.stride;
  if (out.format == BATON_INT4) return quantise_groups(x, out, row);
  if (out.format == BATON_INT8) {
    rotate(x, out.k, room);
    out.totals[row] = quantise(room, out.stride, static_cast<int8_t*>(out.data) + offset, out.scales[row]);
    return;
  }
  for (int i = 0; i < out.stride; i += 16) {
    const __m256 low = load_some(x + i, out.k - i), high = load_some(x + i + 8, out.k - i - 8);
    if (out.format == BATON_FP32) {
      float* to = static_cast<float*>(out.data) + offset + i;
      _mm256_store_ps(to, low);
      _mm256_store_ps(to + 8, high);
    } else {
      const __m256i mixed = _mm256_packus_epi32(round_to_bf16(low), round_to_bf16(high));
      uint16_t* to = static_cast<uint16_t*>(out.data) + offset + i;
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(mixed, 0b11011000));
    }
  }
}

void linear(const LinearTask& task, int panel_begin, int panel_end) {
  switch (task.w->format) {
    case BATON_FP32: return multiply_panels<Fp32>(task, panel_begin, panel_end);
    case BATON_BF16: return multiply_panels<Bf16>(task, panel_begin, panel_end);
    case BATON_INT8: return multiply_panels<Int8>(task, panel_begin, panel_end);
    default: return multiply_panels<Int4>(task, panel_begin, panel_end);
  }
}

}  // namespace baton::avx2
