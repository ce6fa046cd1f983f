// The row operations of an instruction set, over its `Vec` (include one of vector_*.h first). Each works on one row,
// in one order of additions that depends on the row's length alone.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"

namespace baton {
namespace {

using Reg = Vec::Reg;

// f(i, n) for each register of values [i, i + n), n = kWidth but for the last.
template <typename F>
void each_register(int n, F&& f) {
  int i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) f(i, Vec::kWidth);
  if (i < n) f(i, n - i);
}

Reg load_some(const float* x, int n) { return n == Vec::kWidth ? Vec::load(x) : Vec::load_first(x, n); }

void store_some(float* out, Reg x, int n) {
  if (n == Vec::kWidth) return Vec::store(out, x);
  Vec::store_first(out, x, n);
}

float sum_of_squares(const float* x, int n) {
  Reg sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};  // four additions in flight
  const int step = 4 * Vec::kWidth;
  int i = 0;
  for (; i + step <= n; i += step)
    for (int j = 0; j < 4; ++j) {
      const Reg part = Vec::load(x + i + j * Vec::kWidth);
      sums[j] = Vec::mul_add(part, part, sums[j]);
    }
  each_register(n - i, [&](int j, int count) {
    const Reg part = load_some(x + i + j, count);
    sums[0] = Vec::mul_add(part, part, sums[0]);
  });
  return Vec::sum(Vec::add(Vec::add(sums[0], sums[1]), Vec::add(sums[2], sums[3])));
}

// e^x for |x| < 87; further out the result stays at e^+-87.
Reg exp_of(Reg x) {
  const Reg bounded = Vec::min(Vec::set(87.0f), Vec::max(Vec::set(-87.0f), x));
  const Reg whole = Vec::round(Vec::mul(bounded, Vec::set(kLog2E)));
  Reg rest = Vec::mul_add(whole, Vec::set(-kLn2), bounded);  // exact, also where mul_add rounds twice
  rest = Vec::mul(Vec::mul_add(whole, Vec::set(-kLn2Rest), rest), Vec::set(kLog2E));
  Reg power = Vec::set(kPow2[6]);
  for (int i = 5; i >= 0; --i) power = Vec::mul_add(power, rest, Vec::set(kPow2[i]));
  return Vec::scale(power, whole);
}

void rms_norm_row(const float* x, const float* weight, float eps, int n, float* out) {
  const Reg scale = Vec::set(1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps));
  each_register(n, [&](int i, int count) {
    const Reg normal = Vec::mul(load_some(x + i, count), scale);
    store_some(out + i, Vec::mul(normal, load_some(weight + i, count)), count);
  });
}

// silu(gate) * up, with silu(g) = g / (1 + e^-g).
void swiglu_row(const float* gate_up, int n, float* out) {
  each_register(n, [&](int i, int count) {
    const Reg gate = load_some(gate_up + i, count), up = load_some(gate_up + n + i, count);
    const Reg below = Vec::add(Vec::set(1.0f), exp_of(Vec::sub(Vec::zero(), gate)));
    store_some(out + i, Vec::mul(Vec::div(gate, below), up), count);
  });
}

void rope_row(float* head, const float* cos_sin, int head_dim) {
  const int half = head_dim / 2;
  each_register(half, [&](int i, int count) {
    const Reg low = load_some(head + i, count), high = load_some(head + half + i, count);
    const Reg cos = load_some(cos_sin + i, count), sin = load_some(cos_sin + half + i, count);
    store_some(head + i, Vec::sub(Vec::mul(low, cos), Vec::mul(high, sin)), count);
    store_some(head + half + i, Vec::add(Vec::mul(high, cos), Vec::mul(low, sin)), count);
  });
}

// What sampling draws by: e^((x - most) / temperature), `most` being the greatest of all; nothing is below e^-87.
void weigh_row(const float* logits, int n, float most, float temperature, float* out) {
  each_register(n, [&](int i, int count) {
    const Reg below = Vec::sub(load_some(logits + i, count), Vec::set(most));
    store_some(out + i, exp_of(Vec::div(below, Vec::set(temperature))), count);
  });
}

// A maximum loses a NaN, 0 * NaN does not; 0 * infinity is NaN too, and then plain code looks again.
// What is streamed past the caches is ordered by the locked count with which a task of the team ends.
float keep_logits_row(const float* logits, int n, bool far, float* out) {
  const bool stream = far && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  Reg most = Vec::set(logits[0]), zeros = Vec::zero();
  each_register(n, [&](int i, int count) {
    const Reg part = load_some(logits + i, count);
    if (stream && count == Vec::kWidth)
      Vec::stream(out + i, part);
    else
      store_some(out + i, part, count);
    most = Vec::max(most, Vec::keep_first(part, count, logits[0]));
    zeros = Vec::mul_add(part, Vec::zero(), zeros);
  });
  if (Vec::sum(zeros) == 0) return Vec::greatest(most);
  return *std::max_element(logits, logits + n, [](float a, float b) { return a < b || (b != b && a == a); });
}

// Values as T by `store` of a whole register, into as much of `out` as there is.
template <typename T, typename F>
void convert_row(const float* values, int n, T* out, F&& store) {
  each_register(n, [&](int i, int count) {
    T part[Vec::kWidth];
    store(part, load_some(values + i, count));
    std::memcpy(out + i, part, count * sizeof(T));
  });
}

// int8: one scale per token and head, so that a block's bytes do not depend on how the tokens came. A row with a value
// that is not finite has a scale that is not, and zeros: all of it is read as NaN.
void store_int8_row(const float* values, int head_dim, int8_t* out, float* out_scale) {
  Reg largest = Vec::zero();
  each_register(head_dim, [&](int i, int count) {
    largest = Vec::greater_magnitude(largest, load_some(values + i, count));
  });
  const float most = Vec::greatest_magnitude(largest), scale = most / 127.0f;
  std::memcpy(out_scale, &scale, sizeof scale);
  if (!std::isfinite(most)) {
    std::memset(out, 0, head_dim);
    return;
  }
  const Reg inverse = Vec::set(most > 1e-30f ? 127.0f / most : 0.0f);  // 1 / scale must be finite
  convert_row(values, head_dim, out, [&](int8_t* to, Reg x) { Vec::store_int8(to, Vec::mul(x, inverse)); });
}

void store_kv_row(const float* values, int format, int head_dim, int block_size, int slot, uint8_t* run) {
  const int64_t at = static_cast<int64_t>(slot) * head_dim;
  if (format == BATON_FP32) {
    std::memcpy(reinterpret_cast<float*>(run) + at, values, head_dim * sizeof(float));
  } else if (format == BATON_BF16) {
    convert_row(values, head_dim, reinterpret_cast<uint16_t*>(run) + at,
                [](uint16_t* to, Reg x) { Vec::store_bf16(to, x); });
  } else {
    float* scales = reinterpret_cast<float*>(run + static_cast<int64_t>(block_size) * head_dim);
    store_int8_row(values, head_dim, reinterpret_cast<int8_t*>(run) + at, scales + slot);
  }
}

}  // namespace
}  // namespace baton
