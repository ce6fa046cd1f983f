// Where the keys and values of one layer and KV head lie in the pool, for one sequence.
#pragma once
#include <cstdint>

#include "isa.h"

namespace baton {
namespace {

struct KvPool {
  const uint8_t* runs;   // the K run of block 0; the V run follows at run_bytes
  const int32_t* blocks;
  int64_t block_bytes, run_bytes;
  int block_size, head_dim, format;

  explicit KvPool(const AttentionTask& task) {
    const BatonShape& shape = *task.shape;
    block_size = shape.block_size;
    head_dim = shape.head_dim;
    format = shape.kv_format;
    const int64_t elements = static_cast<int64_t>(block_size) * head_dim;
    run_bytes = format == BATON_FP32 ? 4 * elements : format == BATON_BF16 ? 2 * elements : elements + 4 * block_size;
    block_bytes = 2 * run_bytes * shape.num_kv_heads * shape.num_layers;
    runs = task.batch->pool + 2 * run_bytes * (static_cast<int64_t>(task.layer) * shape.num_kv_heads + task.kv_head);
    blocks = task.batch->blocks + task.span->first_block;
  }

  int element_bytes() const { return format == BATON_FP32 ? 4 : format == BATON_BF16 ? 2 : 1; }
  // The K run (V: `which` = 1) that holds a token, and the elements and scale of that token.
  const uint8_t* run(int token, int which) const {
    return runs + blocks[token / block_size] * block_bytes + which * run_bytes;
  }
  const uint8_t* elements(int token, int which) const {
    return run(token, which) + static_cast<int64_t>(token % block_size) * head_dim * element_bytes();
  }
  // int8: of this token and those after it in its block.
  const float* scales(int token, int which) const {
    return reinterpret_cast<const float*>(run(token, which) + static_cast<int64_t>(block_size) * head_dim) +
           token % block_size;
  }
};

}  // namespace
}  // namespace baton
