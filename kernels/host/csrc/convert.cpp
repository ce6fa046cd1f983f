// KV from one format to another, a run at a time: every row is widened to fp32, which is exact but for the product of
// an int8 element and its scale, and stored as a step stores a row it has computed (Isa::store_kv).
#include <cstring>

#include "abi.h"
#include "program.h"

namespace baton {
namespace {

constexpr int kMostHeadDim = 256;  // what a program takes, too

void widen_bf16(const uint8_t* row, int head_dim, float* values) {
  const uint16_t* elements = reinterpret_cast<const uint16_t*>(row);
  uint32_t* bits = reinterpret_cast<uint32_t*>(values);
  for (int i = 0; i < head_dim; i++) bits[i] = uint32_t(elements[i]) << 16;
}

void widen_int8(const uint8_t* row, float scale, int head_dim, float* values) {
  const int8_t* elements = reinterpret_cast<const int8_t*>(row);
  for (int i = 0; i < head_dim; i++) values[i] = float(elements[i]) * scale;
}

}  // namespace
}  // namespace baton

using namespace baton;

void baton_convert_kv(const char* isa, const BatonShape* shape, const uint8_t* from, int32_t num_runs,
                      int32_t to_format, uint8_t* to) {
  const Isa& table = *find_isa(isa);
  BatonShape theirs = *shape, ours = *shape;
  ours.kv_format = to_format;
  const int dim = shape->head_dim, format = shape->kv_format;
  const size_t row_bytes = size_t(dim) * element_bytes(format);
  alignas(64) float values[kMostHeadDim];
  for (int run = 0; run < num_runs; run++, from += run_bytes(theirs), to += run_bytes(ours)) {
    const float* scales = reinterpret_cast<const float*>(from + row_bytes * shape->block_size);
    for (int slot = 0; slot < shape->block_size; slot++) {
      const uint8_t* row = from + slot * row_bytes;
      if (format == BATON_FP32) {
        std::memcpy(values, row, row_bytes);
      } else if (format == BATON_BF16) {
        widen_bf16(row, dim, values);
      } else {
        widen_int8(row, scales[slot], dim, values);
      }
      table.store_kv(values, to_format, dim, shape->block_size, slot, to);
    }
  }
}
