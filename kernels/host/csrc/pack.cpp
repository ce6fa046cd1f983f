// Weight matrices into panels, as pack.h says. Once per model: plain code.
#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace baton {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// To nearest, ties to even; a NaN stays one.
uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// To nearest, ties to even; magnitudes past 65504 become infinite.
uint16_t to_fp16(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24, which the addition rounds to
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    return static_cast<uint16_t>(sign | (bits_of(shifted + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t rebased = magnitude - (112u << 23);  // exponent bias 127 to 15
  return static_cast<uint16_t>(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

// put(panel, column, row of W) for each row of W that exists, its panel zeroed first.
template <typename Put>
void pack(int format, int n, int k, void* panels, Put put) {
  const int64_t bytes = panel_bytes(format, k);
  std::memset(panels, 0, static_cast<size_t>(num_panels(n) * bytes));
  for (int row = 0; row < n; ++row) put(static_cast<uint8_t*>(panels) + row / kPanel * bytes, row % kPanel, row);
}

void pack_int8_row(const float* w, int k, uint8_t* panel, int column, std::vector<float>& rotated) {
  rotate(w, k, rotated.data());
  float most = 0;
  for (float value : rotated) most = std::fmax(most, std::fabs(value));
  const float inverse = most > kLeastMagnitude ? kInt8Most / most : 0;
  uint8_t* out = panel + column * 4;
  for (int i = 0; i < padded(k); ++i) {
    const int q = static_cast<int>(std::nearbyint(rotated[i] * inverse));
    out[i / 4 * kLineBytes + i % 4] = static_cast<uint8_t>(kInt8Zero + q);
  }
  reinterpret_cast<float*>(panel + padded(k) * kPanel)[column] = most / kInt8Most / kRotated;
}

void pack_int4_row(const uint8_t* q, const float* scale, const float* minimum, int k, uint8_t* panel, int column) {
  for (int group = 0; group < k / kGroup; ++group, panel += kInt4GroupBytes) {
    for (int i = 0; i < kGroup; ++i) {
      const int shift = i % 8 < 4 ? 0 : 4;
      panel[i / 8 * kLineBytes + column * 4 + i % 4] |= static_cast<uint8_t>(q[group * kGroup + i] << shift);
    }
    uint16_t* last = reinterpret_cast<uint16_t*>(panel + 4 * kLineBytes);
    last[column] = to_fp16(scale[group]);
    last[kPanel + column] = to_fp16(minimum[group]);
  }
}

}  // namespace

int64_t panel_bytes(int format, int k) {
  const int64_t size = padded(k);
  switch (format) {
    case BATON_FP32: return size * kLineBytes;
    case BATON_BF16: return size / 2 * kLineBytes;
    case BATON_INT8: return size / 4 * kLineBytes + kLineBytes;
    default: return size / kGroup * kInt4GroupBytes;
  }
}

void rotate(const float* x, int k, float* out) {
  if (out != x) std::memcpy(out, x, k * sizeof(float));
  std::fill(out + k, out + padded(k), 0.0f);
  for (int apart = 1; apart < kRotated; apart *= 2)
    for (int i = 0; i < padded(k); ++i) {
      if (i & apart) continue;
      const float sum = out[i] + out[i + apart], difference = out[i] - out[i + apart];
      out[i] = sum;
      out[i + apart] = difference;
    }
}

}  // namespace baton

using namespace baton;

int64_t baton_packed_bytes(int32_t format, int32_t n, int32_t k) { return num_panels(n) * panel_bytes(format, k); }

void baton_pack_fp32(const float* w, int32_t n, int32_t k, void* panels) {
  pack(BATON_FP32, n, k, panels, [&](uint8_t* panel, int column, int row) {
    float* out = reinterpret_cast<float*>(panel) + column;
    for (int i = 0; i < k; ++i) out[i * kPanel] = w[static_cast<int64_t>(row) * k + i];
  });
}

void baton_pack_bf16(const float* w, int32_t n, int32_t k, void* panels) {
  pack(BATON_BF16, n, k, panels, [&](uint8_t* panel, int column, int row) {
    uint16_t* out = reinterpret_cast<uint16_t*>(panel) + column * 2;
    for (int i = 0; i < k; ++i) out[i / 2 * kPanel * 2 + i % 2] = to_bf16(w[static_cast<int64_t>(row) * k + i]);
  });
}

void baton_pack_int8(const float* w, int32_t n, int32_t k, void* panels) {
  std::vector<float> rotated(padded(k));
  pack(BATON_INT8, n, k, panels, [&](uint8_t* panel, int column, int row) {
    pack_int8_row(w + static_cast<int64_t>(row) * k, k, panel, column, rotated);
  });
}

void baton_pack_int4(const uint8_t* q, const float* scale, const float* minimum, int32_t n, int32_t k, void* panels) {
  const int groups = k / kGroup;
  pack(BATON_INT4, n, k, panels, [&](uint8_t* panel, int column, int row) {
    const int64_t r = row;
    pack_int4_row(q + r * k, scale + r * groups, minimum + r * groups, k, panel, column);
  });
}
