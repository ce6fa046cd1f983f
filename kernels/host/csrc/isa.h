// What an instruction set offers to a step: a table of functions, one translation unit set per instruction set
// (gemm_<isa>.cpp, attention_<isa>.cpp, rows_<isa>.cpp), each compiled with its own flags. Nothing outside these files
// may use intrinsics, and nothing in them may be inline in a header that others include.
//
// Exactness: what a row gets depends on that row alone. Each function gives the same bits for a row whatever the other
// rows of the call, the number of rows, the chunk the row came in, and how tasks were dealt to threads. So a matrix
// product goes through k in one order whatever m (a tile with one row does what a tile with sixteen does), and
// attention goes through keys in tiles of one size from position 0 on, reading K and V from the pool, the row's own too.
#pragma once
#include <cstddef>
#include <cstdint>

#include "abi.h"

namespace baton {

constexpr int kPanel = 16;     // output columns of one panel
constexpr int kGroup = 32;     // int4: values that share a scale
constexpr int kKeyTile = 32;   // keys per attention tile, from position 0 on (AMX has its own)
constexpr int kPadK = 64;      // activations are zero-padded to a multiple of this

// Activations [rows, stride] as products with weights of `format` read them; every row 64-byte aligned, zero beyond k
// (int8: k rounded up to kRotated). Elements are fp32, bf16, or for int8 and int4 bytes with value = element * scale:
// int8 has one scale for a row, whose values are rotated as pack.h says; int4 has one for each group of kGroup.
struct Activations {
  void* data;
  float* scales;      // int8: [rows]; int4: [rows, stride / kGroup]; else null
  int32_t* totals;    // int8: [rows] sums of the elements; else null
  float* sums;        // int4: [rows, stride / kGroup] sums of each group's values; else null
  int32_t k, stride;  // elements
  int32_t format;     // BatonFormat of the weights
};

// `static`: the linker would merge inline functions of files that were compiled for different instruction sets.
static inline int padded(int k) { return (k + kPadK - 1) / kPadK * kPadK; }

// y [rows, y_stride] fp32 (+)= x W^T for panels [panel_begin, panel_end) and rows [0, num_rows). The columns of panel
// `y_panel` are y's first.
struct LinearTask {
  Activations x;
  const BatonMatrix* w;
  float* y;
  int32_t num_rows, y_stride;
  bool accumulate;
  int32_t y_panel = 0;
};

struct AttentionTask {
  const BatonShape* shape;
  const BatonBatch* batch;
  const BatonSpan* span;
  int32_t layer, kv_head;
  int32_t row_begin, row_end;  // within the span
  const float* q;              // [batch rows, q_stride], rotated, not scaled; head h at h * head_dim
  int32_t q_stride;
  float* out;                  // [batch rows, num_heads * head_dim]
  const AttentionTask* next = nullptr;  // whose K and V may be fetched towards the end of this one
};

struct Isa {
  const char* name;
  // Row operations; each handles one row.
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  // Rounds or quantises, pads, sums. room: [stride] floats, 64-byte aligned; may be x.
  void (*to_activation)(const float* x, const Activations& out, int row, float* room);
  void (*swiglu)(const float* gate_up, int n, float* out);                 // n: of the output
  void (*rope)(float* head, const float* cos_sin, int head_dim);           // [cos half | sin half], half-split form
  void (*weigh)(const float* logits, int n, float most, float temperature, float* out);  // e^((x - most) / temperature)
  // Logits to their row in memory, past the caches if `far` and `out` begins a line; the greatest, NaN if one is NaN.
  float (*keep_logits)(const float* logits, int n, bool far, float* out);
  // k and v of one token and kv head (rotated, fp32) into run pointers' token slot, in shape.kv_format.
  void (*store_kv)(const float* values, int format, int head_dim, int block_size, int slot, uint8_t* run);
  void (*linear)(const LinearTask& task, int panel_begin, int panel_end);
  // scratch: attention_scratch_bytes, 64-byte aligned, one per thread.
  void (*attention)(const AttentionTask& task, uint8_t* scratch);
  size_t (*attention_scratch_bytes)(const BatonShape& shape);
  int attention_rows;  // rows of a span per attention task
  void (*thread_begin)();  // once per step and thread (AMX tile configuration), may be null
  void (*thread_end)();
};

const Isa& isa_scalar();
const Isa& isa_avx2();
const Isa& isa_avx512();
const Isa& isa_amx();
const Isa* find_isa(const char* name);  // null: unknown, or this CPU lacks it

}  // namespace baton
