// Matrix products and their activations without any instruction set: what the formats mean, said once in plain code.
// Sums run over k upwards, as everywhere; int8 and int4 give the same bits as the vector files, whose integer sums are
// exact and whose few roundings are these.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "pack.h"
#include "parts.h"

namespace baton::scalar {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float from_bf16(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }

uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_fp16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16, magnitude = value & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  const float scaled = from_bits(magnitude << 13) * 0x1p112f;  // exponent bias 15 to 127; subnormals too
  return from_bits(sign | bits_of(scaled));
}

// Values that share a scale, as bytes. Sets their scale; returns the sum of the bytes.
int32_t quantise(const float* x, int count, int8_t* out, float& scale) {
  // As integers, magnitudes keep their order and a NaN is the greatest: it reaches the scale, and so the product.
  uint32_t most_bits = 0;
  for (int i = 0; i < count; ++i) most_bits = std::max(most_bits, bits_of(x[i]) & 0x7fffffff);
  const float most = from_bits(most_bits), inverse = most > kLeastMagnitude ? kInt8Most / most : 0;
  int32_t sum = 0;
  for (int i = 0; i < count; ++i) sum += out[i] = static_cast<int8_t>(std::lrint(x[i] * inverse));
  scale = most / kInt8Most;
  return sum;
}

// A group that is padding is zeros.
void quantise_groups(const float* x, const Activations& out, int row) {
  const int64_t groups = out.stride / kGroup;
  int8_t* to = static_cast<int8_t*>(out.data) + static_cast<int64_t>(row) * out.stride;
  float *scales = out.scales + row * groups, *sums = out.sums + row * groups;
  for (int group = 0; group < groups; ++group, x += kGroup, to += kGroup) {
    float padding[kGroup] = {};
    const float* values = group < out.k / kGroup ? x : padding;
    const int32_t sum = quantise(values, kGroup, to, scales[group]);
    sums[group] = static_cast<float>(sum) * scales[group];
  }
}

// One row against one panel: out[c] is the product with column c.
void multiply_fp32(const uint8_t* panel, const float* x, int k, float* out) {
  const float* w = reinterpret_cast<const float*>(panel);
  for (int i = 0; i < k; ++i)
    for (int c = 0; c < kPanel; ++c) out[c] += w[i * kPanel + c] * x[i];
}

void multiply_bf16(const uint8_t* panel, const uint16_t* x, int k, float* out) {
  const uint16_t* w = reinterpret_cast<const uint16_t*>(panel);
  for (int i = 0; i < k; ++i)
    for (int c = 0; c < kPanel; ++c) out[c] += from_bf16(w[(i / 2 * kPanel + c) * 2 + i % 2]) * from_bf16(x[i]);
}

void multiply_int8(const uint8_t* panel, const Activations& x, int row, int k, float* out) {
  const int8_t* values = static_cast<const int8_t*>(x.data) + static_cast<int64_t>(row) * x.stride;
  const int32_t correction = kInt8Zero * x.totals[row];
  int32_t dots[kPanel] = {};
  for (int i = 0; i < k; ++i)
    for (int c = 0; c < kPanel; ++c) dots[c] += panel[(i / 4 * kPanel + c) * 4 + i % 4] * values[i];
  const float* scales = reinterpret_cast<const float*>(panel + k * kPanel);
  for (int c = 0; c < kPanel; ++c) out[c] = static_cast<float>(dots[c] - correction) * (x.scales[row] * scales[c]);
}

void multiply_int4(const uint8_t* panel, const Activations& x, int row, int k, float* out) {
  const int8_t* values = static_cast<const int8_t*>(x.data) + static_cast<int64_t>(row) * x.stride;
  const int64_t first = static_cast<int64_t>(row) * (x.stride / kGroup);
  const float *scales = x.scales + first, *sums = x.sums + first;
  for (int group = 0; group < k / kGroup; ++group, panel += kInt4GroupBytes, values += kGroup) {
    const uint16_t* last = reinterpret_cast<const uint16_t*>(panel + 4 * kLineBytes);
    for (int c = 0; c < kPanel; ++c) {
      int32_t dot = 0;
      for (int i = 0; i < kGroup; ++i)
        dot += (panel[i / 8 * kLineBytes + c * 4 + i % 4] >> (i % 8 < 4 ? 0 : 4) & 15) * values[i];
      out[c] = std::fma(from_fp16(last[c]), static_cast<float>(dot) * scales[group], out[c]);
      out[c] = std::fma(-from_fp16(last[kPanel + c]), sums[group], out[c]);
    }
  }
}

void multiply(const LinearTask& task, const uint8_t* panel, int row, float* out) {
  const int k = padded(task.w->k);
  const int64_t offset = static_cast<int64_t>(row) * task.x.stride;
  switch (task.w->format) {
    case BATON_FP32: return multiply_fp32(panel, static_cast<const float*>(task.x.data) + offset, k, out);
    case BATON_BF16: return multiply_bf16(panel, static_cast<const uint16_t*>(task.x.data) + offset, k, out);
    case BATON_INT8: return multiply_int8(panel, task.x, row, k, out);
    default: return multiply_int4(panel, task.x, row, k, out);
  }
}

}  // namespace

void to_activation(const float* x, const Activations& out, int row, float* room) {
  const int64_t offset = static_cast<int64_t>(row) * out.stride;
  if (out.format == BATON_INT4) return quantise_groups(x, out, row);
  if (out.format == BATON_INT8) {
    rotate(x, out.k, room);
    out.totals[row] = quantise(room, out.stride, static_cast<int8_t*>(out.data) + offset, out.scales[row]);
  } else if (out.format == BATON_FP32) {
    float* to = static_cast<float*>(out.data) + offset;
    std::copy(x, x + out.k, to);
    std::fill(to + out.k, to + out.stride, 0.0f);
  } else {
    uint16_t* to = static_cast<uint16_t*>(out.data) + offset;
    std::transform(x, x + out.k, to, to_bf16);
    std::fill(to + out.k, to + out.stride, static_cast<uint16_t>(0));
  }
}

void linear(const LinearTask& task, int panel_begin, int panel_end) {
  const int64_t bytes = panel_bytes(task.w->format, task.w->k);
  for (int p = panel_begin; p < panel_end; ++p) {
    const uint8_t* panel = static_cast<const uint8_t*>(task.w->panels) + p * bytes;
    const int columns = std::min(kPanel, task.w->n - p * kPanel);
    for (int row = 0; row < task.num_rows; ++row) {
      float out[kPanel] = {};
      multiply(task, panel, row, out);
      float* y = task.y + static_cast<int64_t>(row) * task.y_stride + (p - task.y_panel) * kPanel;
      for (int c = 0; c < columns; ++c) y[c] = task.accumulate ? y[c] + out[c] : out[c];
    }
  }
}

}  // namespace baton::scalar
