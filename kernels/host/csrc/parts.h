// Which functions make up an `Isa` table, and how its files call them: gemm_<isa>.cpp, rows_<isa>.cpp and
// attention_<isa>.cpp define them in namespace baton::<isa>; dispatch.cpp takes them from here. They are weak, so that
// the library links while a file is missing; what an instruction set does not bring (AMX: rows) it takes from the one
// below it. `thread_begin` and `thread_end` are optional.
#pragma once
#include "isa.h"

#define BATON_PART __attribute__((weak))
#define BATON_PARTS(isa)                                                                                      \
  namespace baton {                                                                                           \
  namespace isa {                                                                                             \
  BATON_PART void rms_norm(const float* x, const float* weight, float eps, int n, float* out);                \
  BATON_PART void to_activation(const float* x, const Activations& out, int row, float* room);                \
  BATON_PART void swiglu(const float* gate_up, int n, float* out);                                            \
  BATON_PART void rope(float* head, const float* cos_sin, int head_dim);                                      \
  BATON_PART void weigh(const float* logits, int n, float most, float temperature, float* out);               \
  BATON_PART float keep_logits(const float* logits, int n, bool far, float* out);                             \
  BATON_PART void store_kv(const float* values, int format, int head_dim, int block_size, int slot, uint8_t* run); \
  BATON_PART void linear(const LinearTask& task, int panel_begin, int panel_end);                             \
  BATON_PART void attention(const AttentionTask& task, uint8_t* scratch);                                     \
  BATON_PART size_t attention_scratch_bytes(const BatonShape& shape);                                         \
  BATON_PART int attention_rows();                                                                            \
  BATON_PART void thread_begin();                                                                             \
  BATON_PART void thread_end();                                                                               \
  }                                                                                                           \
  }

BATON_PARTS(scalar)
BATON_PARTS(avx2)
BATON_PARTS(avx512)
BATON_PARTS(amx)
