// Four fp32 values in plain C++ (the compilers' vector extension): what rows_vector.h and attention_vector.h are
// written in, for any processor. Multiply-add rounds twice here, because plain processors have no other.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "pow2.h"

namespace baton {
namespace {

struct Vec {
  using Reg = float __attribute__((vector_size(16)));
  using Bits = int32_t __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;

  static Reg blend(Bits mask, Reg yes, Reg no) { return (Reg)(((Bits)yes & mask) | ((Bits)no & ~mask)); }
  static Bits first(int n) { return Bits{0, 1, 2, 3} < (Bits{} + n); }
  static Reg zero() { return Reg{}; }
  static Reg set(float x) { return Reg{x, x, x, x}; }
  static Reg load(const float* x) { return load_first(x, kWidth); }
  static void store(float* out, Reg x) { std::memcpy(out, &x, sizeof x); }
  static void stream(float* out, Reg x) { store(out, x); }  // plain processors have no way past the caches
  static Reg load_first(const float* x, int n) {
    Reg r{};
    std::memcpy(&r, x, n * sizeof(float));
    return r;
  }
  static void store_first(float* out, Reg x, int n) { std::memcpy(out, &x, n * sizeof(float)); }

  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg max(Reg a, Reg b) { return blend(a > b, a, b); }  // NaN if b is
  static Reg min(Reg a, Reg b) { return blend(a < b, a, b); }  // NaN if b is
  static Reg mul_add(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg abs(Reg x) { return (Reg)((Bits)x & 0x7fffffff); }
  // To the nearest whole number, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
  static Reg round(Reg x) { return (x + 12582912.0f) - 12582912.0f; }
  // x * 2^n, n whole; 0 where n is below the least exponent.
  static Reg scale(Reg x, Reg n) {
    const Reg scaled = (Reg)((Bits)x + (__builtin_convertvector(n, Bits) << 23));
    return blend(n < kLeastPow2, zero(), scaled);
  }

  static float sum(Reg x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static float greatest(Reg x) { return std::fmax(std::fmax(x[0], x[1]), std::fmax(x[2], x[3])); }
  // As integers, magnitudes keep their order and a NaN is the greatest.
  static Reg greater_magnitude(Reg most, Reg x) {
    const Bits a = (Bits)most, b = (Bits)abs(x);
    return blend(a > b, most, (Reg)b);
  }
  static float greatest_magnitude(Reg most) {
    for (int i = 1; i < kWidth; ++i)
      if (((Bits)most)[i] > ((Bits)most)[0]) most[0] = most[i];
    return most[0];
  }
  static bool any_above(Reg x, Reg bound) {
    const Bits above = x > bound;
    return above[0] | above[1] | above[2] | above[3];
  }
  // Lanes from n on become `other`.
  static Reg keep_first(Reg x, int n, float other) { return n >= kWidth ? x : blend(first(n), x, set(other)); }

  static Reg load_bf16(const uint16_t* x) { return (Reg)(Bits{x[0], x[1], x[2], x[3]} << 16); }
  static Reg load_int8(const int8_t* x) { return __builtin_convertvector((Bits{x[0], x[1], x[2], x[3]}), Reg); }
  static void store_bf16(uint16_t* out, Reg x) {  // nearest, ties to even; a NaN stays one
    const Bits bits = (Bits)x;
    for (int i = 0; i < kWidth; ++i) {
      const uint32_t b = bits[i];
      out[i] = static_cast<uint16_t>((x[i] == x[i] ? b + 0x7fff + ((b >> 16) & 1) : b | 0x400000) >> 16);
    }
  }
  static void store_int8(int8_t* out, Reg x) {  // nearest whole number
    const Reg whole = round(x);
    for (int i = 0; i < kWidth; ++i) out[i] = static_cast<int8_t>(whole[i]);
  }

  // rows[i] lane j <-> rows[j] lane i.
  static void transpose(Reg (&rows)[kWidth]) {
    const Reg a = rows[0], b = rows[1], c = rows[2], d = rows[3];
    for (int i = 0; i < kWidth; ++i) rows[i] = Reg{a[i], b[i], c[i], d[i]};
  }
};

}  // namespace
}  // namespace baton
