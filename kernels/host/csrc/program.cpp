// Checks an op list and lays out the buffers of a program.
#include "program.h"

#include <algorithm>

#include "pack.h"

namespace baton {

int element_bytes(int format) { return format == BATON_FP32 ? 4 : format == BATON_BF16 ? 2 : 1; }

size_t run_bytes(const BatonShape& shape) {
  const size_t scale_bytes = shape.kv_format == BATON_INT8 ? sizeof(float) : 0;
  return shape.block_size * (size_t(shape.head_dim) * element_bytes(shape.kv_format) + scale_bytes);
}

size_t block_bytes(const BatonShape& shape) { return size_t(shape.num_layers) * shape.num_kv_heads * 2 * run_bytes(shape); }

ActivationBuffer::ActivationBuffer(size_t rows, size_t elements)
    : data(make_buffer<uint8_t>(elements * 4)),
      scales(make_buffer<float>(elements / kGroup + rows)),
      sums(make_buffer<float>(elements / kGroup + rows)),
      totals(make_buffer<int32_t>(rows)) {}

// AMX reads sixteen rows of bf16 at once, a cache line of each. An odd number of lines from row to row spreads them over
// the sets of L1; at k = 1536 a product is 1.1 times as fast as with 48 lines, which meet in four sets.
int activation_stride(int k, int format) {
  constexpr int kLine = kLineBytes / 2;
  return format == BATON_BF16 ? padded(k) + (padded(k) / kLine % 2 ? 0 : kLine) : padded(k);
}

Activations ActivationBuffer::view(int k, int format) const {
  const bool eight = format == BATON_INT8, four = format == BATON_INT4;
  return {data.get(), eight || four ? scales.get() : nullptr, eight ? totals.get() : nullptr,
          four ? sums.get() : nullptr, k, activation_stride(k, format), format};
}

// What stands in the registers while an op list is checked.
struct Registers {
  Source x = Source::kNone;
  int x_size = 0, wide_size = 0;
  bool has_heads = false;  // `wide` holds rotated q
  const BatonOp* norm = nullptr;
};

namespace {

const char* check_shape(const BatonShape& s) {
  const bool sizes = s.hidden_size > 0 && s.intermediate_size > 0 && s.num_kv_heads > 0 && s.head_dim > 0 &&
                     s.vocab_size > 0 && s.num_layers > 0;
  if (!sizes || s.num_heads <= 0 || s.num_heads % s.num_kv_heads) return "the sizes do not fit together";
  if (s.head_dim % 16 || s.head_dim > 256) return "the head size must be a multiple of 16, at most 256";
  if (s.block_size <= 0 || s.block_size % 16) return "the block size must be a multiple of 16";
  if (s.kv_format != BATON_FP32 && s.kv_format != BATON_BF16 && s.kv_format != BATON_INT8) return "unknown KV format";
  return nullptr;
}

const char* check_matrix(const BatonMatrix& m) {
  if (m.n <= 0 || m.k <= 0 || !m.panels) return "a matrix is empty";
  if (m.format < BATON_FP32 || m.format > BATON_INT4) return "unknown weight format";
  if (m.format == BATON_INT4 && m.k % kGroup) return "an int4 matrix needs rows of a multiple of 32";
  return nullptr;
}

// A matrix product: takes x, and says where it goes.
const char* take_product(const BatonShape& s, const BatonMatrix* m, Registers& r, CompiledOp& op) {
  if (!m) return "a product without a matrix";
  if (r.x == Source::kNone || r.x_size != m->k) return "a matrix does not fit what it is applied to";
  const bool residual = op.kind == BATON_OP_LINEAR_RESIDUAL;
  if (residual && m->n != s.hidden_size) return "a residual has another size than the hidden state";
  if (op.kind == BATON_OP_LM_HEAD && m->n != s.vocab_size) return "the LM head has another size than the vocabulary";
  op.source = r.x;
  if (r.x == Source::kNorm) {
    op.eps = r.norm->eps;
    op.vector = r.norm->vector;
  }
  r.x = Source::kNone;
  r.has_heads = false;
  r.wide_size = op.kind == BATON_OP_LINEAR ? m->n : 0;
  return nullptr;
}

// Advances the registers over `op`, which gets the source of its x. Null, or what is wrong.
const char* take(const BatonShape& s, const BatonOp& given, const BatonMatrix* m, Registers& r, CompiledOp& op) {
  const int qkv = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim;
  switch (op.kind) {
    case BATON_OP_EMBED: return given.vector ? nullptr : "the embedding has no rows";
    case BATON_OP_RMS_NORM:
      if (!given.vector) return "a norm has no weight";
      r.x = Source::kNorm, r.x_size = s.hidden_size, r.norm = &given;
      return nullptr;
    case BATON_OP_SWIGLU:
      if (r.wide_size != 2 * s.intermediate_size) return "SwiGLU has no gate and up";
      r.x = Source::kSwiglu, r.x_size = s.intermediate_size;
      return nullptr;
    case BATON_OP_ROPE_WRITE_KV:
      if (r.wide_size != qkv || op.layer < 0 || op.layer >= s.num_layers) return "there is no q, k and v to rotate";
      r.has_heads = true;
      return nullptr;
    case BATON_OP_ATTENTION:
      if (!r.has_heads || op.layer < 0 || op.layer >= s.num_layers) return "attention has no q";
      r.x = Source::kAttention, r.x_size = s.num_heads * s.head_dim;
      return nullptr;
    case BATON_OP_LINEAR:
    case BATON_OP_LINEAR_RESIDUAL:
    case BATON_OP_LM_HEAD: return take_product(s, m, r, op);
    case BATON_OP_KEEP_SAMPLED_ROWS:
      if (r.x == Source::kSwiglu || r.x == Source::kGated)
        return "rows are dropped between gate|up and the product that reads them";
      r.wide_size = 0;
      return nullptr;
    case BATON_OP_COLLECTIVE:
    case BATON_OP_CAPTURE: return nullptr;
  }
  return "unknown operation";
}

}  // namespace
}  // namespace baton

const char* BatonProgram::compile(const BatonOp* list, int num_ops, const BatonMatrix* given, int num_matrices) {
  using namespace baton;
  if (const char* wrong = check_shape(shape)) return wrong;
  frequencies.assign(shape.rope_frequencies, shape.rope_frequencies + shape.head_dim / 2);
  shape.rope_frequencies = frequencies.data();
  matrices.assign(given, given + num_matrices);
  for (const BatonMatrix& m : matrices)
    if (const char* wrong = check_matrix(m)) return wrong;
  Registers registers;
  for (int i = 0; i < num_ops; i++) {
    if (list[i].matrix >= num_matrices) return "there is no such matrix";
    const BatonMatrix* matrix = list[i].matrix < 0 ? nullptr : &matrices[list[i].matrix];
    CompiledOp op{BatonOpKind(list[i].kind), list[i].layer, matrix, Source::kNone, list[i].eps, list[i].vector};
    if (const char* wrong = take(shape, list[i], matrix, registers, op)) return wrong;
    if (const char* wrong = fuse(op, registers)) return wrong;
    if (matrix) longest_k = std::max(longest_k, int(matrix->k));
    ops.push_back(op);
  }
  for (const CompiledOp& op : ops)
    if (op.kind == BATON_OP_LINEAR) widest = std::max(widest, width_of(op));
  return nullptr;
}

// Has the product before `op` do its work too, where it can. Null, or what is wrong.
const char* BatonProgram::fuse(baton::CompiledOp& op, baton::Registers& registers) {
  using namespace baton;
  const bool follows_product = !ops.empty() && ops.back().kind == BATON_OP_LINEAR;
  if (op.kind == BATON_OP_ROPE_WRITE_KV) {
    if (!follows_product) return "something stands between q, k and v and their rotation";
    ops.back().makes = Makes::kHeads, ops.back().layer = op.layer;
  }
  if (op.kind == BATON_OP_SWIGLU && follows_product && ops.back().matrix->n % (2 * kPanel) == 0) {
    ops.back().makes = Makes::kGated;
    registers.x = Source::kGated;
  }
  if (op.source == Source::kGated && (op.matrix->format == BATON_FP32 || op.matrix->format == BATON_BF16)) {
    const auto gated = std::find_if(ops.rbegin(), ops.rend(), [](const CompiledOp& o) { return o.makes == Makes::kGated; });
    gated->makes = Makes::kRounded, gated->reader = op.matrix;
    op.source = Source::kRounded;
  }
  return nullptr;
}

int BatonProgram::width_of(const baton::CompiledOp& op) const {
  using namespace baton;
  switch (op.makes) {
    case Makes::kProduct: return op.matrix->n;
    case Makes::kGated: return op.matrix->n / 2;
    case Makes::kRounded: return activation_stride(op.reader->k, op.reader->format);
    case Makes::kHeads: return shape.num_heads * shape.head_dim;
  }
  return 0;
}

void BatonProgram::reserve(int num_rows, int num_threads) {
  using namespace baton;
  if (num_rows > reserved_rows) {
    const size_t rows = reserved_rows = std::max(num_rows, 2 * reserved_rows);
    hidden = make_buffer<float>(rows * shape.hidden_size);
    wide = make_buffer<float>(rows * widest);
    mixed = make_buffer<float>(rows * shape.num_heads * shape.head_dim);
    rotation = make_buffer<float>(rows * shape.head_dim);
    slots = make_buffer<Slot>(rows);
    activations = ActivationBuffer(rows, rows * padded(longest_k));
  }
  while (int(threads.size()) < num_threads)
    threads.push_back({ActivationBuffer(kOwnRows, kOwnElements), make_buffer<float>(padded(longest_k)),
                       make_buffer<float>(kChunkRows * std::max(2 * kGatedPanels * kPanel, shape.head_dim)),
                       make_buffer<uint8_t>(isa.attention_scratch_bytes(shape)), 0, 0});
}
