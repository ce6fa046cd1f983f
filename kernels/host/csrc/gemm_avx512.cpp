// Matrix products with AVX-512 (BF16 and VNNI), and activations for them.
//
// A panel's line is one register: 16 columns times as much of k as four bytes of an activation row hold. So fp32, bf16
// and int8 are one loop: per line, each row's four bytes are broadcast and multiplied into that row's accumulator.
// A block of kRows x kPanels accumulators goes through all of k; a smaller block does the same for each of its rows, so
// a row's bits do not depend on the others.
//
// Order: panels outside, rows inside. Weights come from memory once, activations again and again from L2. The first
// rows that meet a block of panels fetch its lines ahead of their use: with few rows, that is where the time goes.
#include "gemm512.h"
#include "parts.h"

namespace baton::avx512 {
namespace {

constexpr int kAhead = 16;  // lines of each panel that are fetched before their use; no panel has fewer

// One block of work: kPanels panels from `panel` on, kRows rows from `row` on.
struct Block {
  const LinearTask& task;
  int64_t panel_bytes;
  int panel, row;

  const uint8_t* weights() const { return static_cast<const uint8_t*>(task.w->panels) + panel * panel_bytes; }
  const uint8_t* activations(int element_bytes) const {
    return static_cast<const uint8_t*>(task.x.data) + static_cast<int64_t>(row) * task.x.stride * element_bytes;
  }
};

inline __m512i broadcast4(const uint8_t* p) {
  int32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

struct Fp32 {
  using Factors = PlainFactors;
  static constexpr int kRows = 6, kPanels = 4, kElementBytes = 4;
  static __m512 add(__m512 sum, __m512i w, __m512i x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum);
  }
};

struct Bf16 {
  using Factors = PlainFactors;
  static constexpr int kRows = 6, kPanels = 4, kElementBytes = 2;
  static __m512 add(__m512 sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
};

struct Int8 {
  using Factors = Int8Factors;
  static constexpr int kRows = 6, kPanels = 4, kElementBytes = 1;
  static Ints add(Ints sum, __m512i w, __m512i x) { return (Ints)_mm512_dpbusd_epi32((__m512i)sum, w, x); }
};

template <typename Format, int kRows, int kPanels>
struct Multiply {
  static void run(const Block& block) {
    if (block.row == 0)
      multiply<true>(block);
    else
      multiply<false>(block);
  }

 private:
  // Unrolled by order: only then does the compiler keep all sums in registers.
  template <bool kFetch>
  static void multiply(const Block& block) {
    typename Format::Factors::Sum sums[kRows][kPanels] = {};
    const int64_t panel_bytes = block.panel_bytes;
    const int64_t row_bytes = static_cast<int64_t>(block.task.x.stride) * Format::kElementBytes;
    const uint8_t *w = block.weights(), *x = block.activations(Format::kElementBytes);
    const int lines = padded(block.task.w->k) * Format::kElementBytes / 4;
    int64_t ahead = kAhead * kLineBytes;
    for (int begin = 0, end = kFetch ? lines - kAhead : lines; begin < lines; begin = end, end = lines) {
      for (int i = begin; i < end; ++i, w += kLineBytes, x += 4) {
        __m512i line[kPanels];
#pragma GCC unroll 8
        for (int p = 0; p < kPanels; ++p) {
          line[p] = _mm512_load_si512(w + p * panel_bytes);
          if (kFetch) _mm_prefetch(w + p * panel_bytes + ahead, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m512i four = broadcast4(x + r * row_bytes);
#pragma GCC unroll 8
          for (int p = 0; p < kPanels; ++p) sums[r][p] = Format::add(sums[r][p], line[p], four);
        }
      }
      // For the end of these panels: the beginning of the next ones.
      ahead = kPanels * panel_bytes - static_cast<int64_t>(lines - kAhead) * kLineBytes;
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      const Columns columns(block.task, block.panel + p);
      const typename Format::Factors factors(block.task, block.weights() + p * panel_bytes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) columns.put(block.row + r, factors.product(sums[r][p], block.row + r));
    }
  }
};

// int4: a group's nibbles are unpacked once for all rows of the block; its dot product is exact in integers, and the
// groups are summed up in order.
struct Int4 {
  static constexpr int kRows = 8, kPanels = 1;
};

template <int kRows>
struct Multiply<Int4, kRows, 1> {
  static void run(const Block& block) {
    const uint8_t* w = block.weights();
    const uint8_t* x = block.activations(1);
    const int64_t stride = block.task.x.stride;
    const int groups = padded(block.task.w->k) / kGroup;
    const float *scales = block.task.x.scales + block.row * (stride / kGroup);
    const float *sums = block.task.x.sums + block.row * (stride / kGroup);
    __m512 totals[kRows] = {};
    for (int g = 0; g < groups; ++g, w += kInt4GroupBytes, x += kGroup) {
      if (block.row == 0)  // panels follow each other, and so do their groups
        for (int line = kAhead; line < kAhead + 5; ++line) _mm_prefetch(w + line * kLineBytes, _MM_HINT_T0);
      const Int4Group group(w);
      const Int4Scales factors(w);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        __m512i dot = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q)
          dot = _mm512_dpbusd_epi32(dot, (__m512i)group.quads[q], broadcast4(x + r * stride + 4 * q));
        totals[r] = factors.add(totals[r], dot, scales[r * (stride / kGroup) + g], sums[r * (stride / kGroup) + g]);
      }
    }
    const Columns columns(block.task, block.panel);
    for (int r = 0; r < kRows; ++r) columns.put(block.row + r, totals[r]);
  }
};

// The block with the greatest number of rows, up to kRows, that is not more than `rows`. Returns that number.
template <typename Format, int kRows, int kPanels>
int multiply_rows(const Block& block, int rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<Format, kRows - 1, kPanels>(block, rows);
  }
  Multiply<Format, kRows, kPanels>::run(block);
  return kRows;
}

// Panels [begin, end), kPanels at a time, then what is left in halves.
template <typename Format, int kPanels>
void multiply_panels(const LinearTask& task, int begin, int end) {
  const int64_t bytes = panel_bytes(task.w->format, task.w->k);
  for (; end - begin >= kPanels; begin += kPanels) {
    for (int row = 0; row < task.num_rows;)
      row += multiply_rows<Format, Format::kRows, kPanels>({task, bytes, begin, row}, task.num_rows - row);
  }
  if constexpr (kPanels > 1) multiply_panels<Format, kPanels / 2>(task, begin, end);
}

// `count` of 16 values from x on, zeros after them.
inline __m512 load_some(const float* x, int count) {
  const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
  return _mm512_maskz_loadu_ps(mask, x);
}

// Sums and differences of values kApart lanes apart. Multiplying by 1 or -1 is exact: this rounds as an addition does.
template <int kApart>
inline __m512 rotate_lanes(__m512 x) {
  static_assert(kApart == 1 || kApart == 2 || kApart == 4 || kApart == 8, "lanes");
  __m512 other;
  if constexpr (kApart == 1) other = _mm512_permute_ps(x, 0b10110001);
  if constexpr (kApart == 2) other = _mm512_permute_ps(x, 0b01001110);
  if constexpr (kApart == 4) other = _mm512_shuffle_f32x4(x, x, 0b10110001);
  if constexpr (kApart == 8) other = _mm512_shuffle_f32x4(x, x, 0b01001110);
  constexpr __mmask16 kMinus[] = {0, 0xaaaa, 0xcccc, 0, 0xf0f0, 0, 0, 0, 0xff00};
  const __m512 one = _mm512_set1_ps(1), signs = _mm512_mask_mov_ps(one, kMinus[kApart], _mm512_set1_ps(-1));
  return _mm512_fmadd_ps(x, signs, other);
}

// Sums and differences of registers kApart apart.
template <int kApart>
inline void rotate_registers(__m512 (&x)[4]) {
  for (int i = 0; i < 4; ++i) {
    if (i & kApart) continue;
    const __m512 sum = _mm512_add_ps(x[i], x[i + kApart]);
    x[i + kApart] = _mm512_sub_ps(x[i], x[i + kApart]);
    x[i] = sum;
  }
}

// As integers, magnitudes keep their order and a NaN is the greatest: it reaches the scale, and so the product.
inline __m512i greater(__m512i most_bits, __m512 x) {
  return _mm512_max_epi32(most_bits, _mm512_and_si512(_mm512_set1_epi32(0x7fffffff), _mm512_castps_si512(x)));
}

// What values are multiplied with to become bytes, and bytes to become values.
struct Scale {
  __m512 inverse;
  float scale;

  explicit Scale(__m512i most_bits) {
    const float most = _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(most_bits))));
    inverse = _mm512_set1_ps(most > kLeastMagnitude ? kInt8Most / most : 0);
    scale = most / kInt8Most;
  }
  // Stores 16 bytes; returns them as integers.
  __m512i quantise(__m512 x, int8_t* to) const {
    const __m512i values = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(values));
    return values;
  }
};

void quantise_rotated(const float* x, const Activations& out, int row, float* room) {
  static_assert(kRotated == 64, "four registers");
  __m512i most_bits = _mm512_setzero_si512(), sums = _mm512_setzero_si512();
  for (int i = 0; i < out.stride; i += kRotated) {
    __m512 block[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int at = i + 16 * j;
      const __m512 pairs = rotate_lanes<2>(rotate_lanes<1>(load_some(x + at, out.k - at)));
      block[j] = rotate_lanes<8>(rotate_lanes<4>(pairs));
    }
    rotate_registers<1>(block);
    rotate_registers<2>(block);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm512_store_ps(room + i + 16 * j, block[j]);
      most_bits = greater(most_bits, block[j]);
    }
  }
  const Scale scale(most_bits);
  int8_t* to = static_cast<int8_t*>(out.data) + static_cast<int64_t>(row) * out.stride;
  for (int i = 0; i < out.stride; i += 16)
    sums = _mm512_add_epi32(sums, scale.quantise(_mm512_load_ps(room + i), to + i));
  out.totals[row] = _mm512_reduce_add_epi32(sums);
  out.scales[row] = scale.scale;
}

void quantise_groups(const float* x, const Activations& out, int row) {
  const int64_t groups = out.stride / kGroup;
  int8_t* to = static_cast<int8_t*>(out.data) + static_cast<int64_t>(row) * out.stride;
  float *scales = out.scales + row * groups, *sums = out.sums + row * groups;
  for (int g = 0; g < groups; ++g, x += kGroup, to += kGroup) {
    const int left = out.k - g * kGroup;
    const __m512 low = load_some(x, left), high = load_some(x + 16, left - 16);
    const Scale scale(greater(greater(_mm512_setzero_si512(), low), high));
    const __m512i sum = _mm512_add_epi32(scale.quantise(low, to), scale.quantise(high, to + 16));
    scales[g] = scale.scale;
    sums[g] = static_cast<float>(_mm512_reduce_add_epi32(sum)) * scale.scale;
  }
}

}  // namespace

void to_activation(const float* x, const Activations& out, int row, float* room) {
  if (out.format == BATON_INT8) return quantise_rotated(x, out, row, room);
  if (out.format == BATON_INT4) return quantise_groups(x, out, row);
  const int64_t offset = static_cast<int64_t>(row) * out.stride;
  for (int i = 0; i < out.stride; i += 16) {
    const __m512 values = load_some(x + i, out.k - i);
    if (out.format == BATON_FP32) {
      _mm512_store_ps(static_cast<float*>(out.data) + offset + i, values);
    } else {
      uint16_t* to = static_cast<uint16_t*>(out.data) + offset + i;
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
    }
  }
}

void linear(const LinearTask& task, int panel_begin, int panel_end) {
  switch (task.w->format) {
    case BATON_FP32: return multiply_panels<Fp32, Fp32::kPanels>(task, panel_begin, panel_end);
    case BATON_BF16: return multiply_panels<Bf16, Bf16::kPanels>(task, panel_begin, panel_end);
    case BATON_INT8: return multiply_panels<Int8, Int8::kPanels>(task, panel_begin, panel_end);
    default: return multiply_panels<Int4, Int4::kPanels>(task, panel_begin, panel_end);
  }
}

}  // namespace baton::avx512
