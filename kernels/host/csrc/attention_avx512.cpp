#include "vector_avx512.h"

#include "attention_vector.h"
#include "parts.h"

namespace baton {
namespace {

// A lane is a pair of bf16 values. int8 elements are exact in bf16; their scales go to the scores and weights.
struct Pairs {
  using Element = uint16_t;
  static constexpr int kPerLane = 2;
  static constexpr int kNative = BATON_BF16;
  static constexpr bool kScalesLate = true;

  static Reg mul_add(Reg a, Reg b, Reg c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static void store(uint16_t* out, Reg x) { Vec::store_bf16(out, x); }
  static void store_weights(float* out, const Reg (&weights)[kTileRegs]) {
    _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(weights[1], weights[0])));
  }
  static void convert(const uint8_t* row, int, float, int dim, uint16_t* out) {
    for (int i = 0; i < dim; i += Vec::kWidth)
      Vec::store_bf16(out + i, Vec::load_int8(reinterpret_cast<const int8_t*>(row) + i));
  }
  // Two rows of values become one of pairs.
  static const float* join(const uint16_t* const* rows, int dim, float* out) {
    for (int i = 0; i < dim; i += Vec::kWidth) {
      const auto wide = [&](int row) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[row] + i)));
      };
      _mm512_storeu_si512(out + i, _mm512_or_si512(wide(0), _mm512_slli_epi32(wide(1), 16)));
    }
    return out;
  }
};

}  // namespace

namespace avx512 {

void attention(const AttentionTask& task, uint8_t* scratch) {
  if (task.shape->kv_format == BATON_FP32)
    Attention<Whole>(task, scratch).run();
  else
    Attention<Pairs>(task, scratch).run();
}

size_t attention_scratch_bytes(const BatonShape& shape) { return Attention<Whole>::scratch_bytes(shape); }

int attention_rows() { return kRowsPerTask; }

}  // namespace avx512
}  // namespace baton
