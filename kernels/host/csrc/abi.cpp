// The C entry points: what Python sees of the library.
#include "abi.h"

#include <atomic>

#include "choose.h"
#include "pack.h"
#include "step.h"

using namespace baton;

int32_t baton_abi_version(void) { return BATON_ABI_VERSION; }

// Four streams a thread, fetched into L2: of what was tried, this came fastest (bench/linear.py).
int64_t baton_read(BatonTeam* team, const void* memory, int64_t num_bytes) {
  constexpr int64_t kStreams = 4, kAhead = 32 * kLineBytes, kWords = kLineBytes / sizeof(int64_t);
  const int64_t each = num_bytes / (team->num_threads() * kStreams) / kLineBytes * kLineBytes;
  std::atomic<int64_t> total{0};
  team->run(team->num_threads(), [&](int task, int) {
    const char* begin = static_cast<const char*>(memory) + task * kStreams * each;
    int64_t sums[kWords] = {};
    for (int64_t at = 0; at < each; at += kLineBytes)
      for (int stream = 0; stream < kStreams; stream++) {
        const char* line = begin + stream * each + at;
        __builtin_prefetch(line + kAhead, 0, 2);
        for (int i = 0; i < kWords; i++) sums[i] += reinterpret_cast<const int64_t*>(line)[i];
      }
    for (int64_t sum : sums) total += sum;
  });
  return total;
}

BatonProgram* baton_program_new(const char* isa, const BatonShape* shape, const BatonOp* ops, int32_t num_ops,
                                const BatonMatrix* matrices, int32_t num_matrices, const char** error) {
  const Isa* table = find_isa(isa);
  *error = table ? nullptr : "this CPU, or this library, lacks the instruction set";
  if (*error) return nullptr;
  auto program = std::make_unique<BatonProgram>(*table, *shape);
  if ((*error = program->compile(ops, num_ops, matrices, num_matrices))) return nullptr;
  return program.release();
}

void baton_program_free(BatonProgram* program) { delete program; }

float* baton_program_hidden(BatonProgram* program) { return program->hidden.get(); }

void baton_program_time(BatonProgram* program, double* seconds) { program->seconds = seconds; }

int32_t baton_step(BatonProgram* program, BatonTeam* team, const BatonBatch* batch, int32_t first_op) {
  return Step(*program, *team, *batch).run(first_op);
}

void baton_linear(const char* isa, BatonTeam* team, const float* x, int32_t m, const BatonMatrix* w, float* y,
                  int32_t accumulate) {
  const Isa& table = *find_isa(isa);
  const ActivationBuffer buffer(m, size_t(m) * padded(w->k));
  const Activations activations = buffer.view(w->k, w->format);
  const int panels = num_panels(w->n), each = panels_per_task(panels, team->num_threads());
  const auto rooms = make_buffer<float>(size_t(team->num_threads()) * padded(w->k));
  team->run(m, [&](int row, int thread) {
    table.to_activation(x + size_t(row) * w->k, activations, row, &rooms[size_t(thread) * padded(w->k)]);
  });
  team->run((panels + each - 1) / each, [&](int task, int) {
    if (table.thread_begin) table.thread_begin();
    table.linear({activations, w, y, m, w->n, accumulate != 0}, task * each, std::min((task + 1) * each, panels));
    if (table.thread_end) table.thread_end();
  });
}

void baton_attention(const char* isa, BatonTeam* team, const BatonShape* shape, const BatonBatch* batch, int32_t layer,
                     const float* q, float* out) {
  const Isa& table = *find_isa(isa);
  const int width = shape->num_heads * shape->head_dim;
  team->run(batch->num_spans * shape->num_kv_heads, [&](int task, int) {
    const BatonSpan& span = batch->spans[task / shape->num_kv_heads];
    const auto scratch = make_buffer<uint8_t>(table.attention_scratch_bytes(*shape));
    if (table.thread_begin) table.thread_begin();
    for (int row = 0; row < span.num_rows; row += table.attention_rows) {
      const int end = std::min(row + table.attention_rows, span.num_rows);
      table.attention({shape, batch, &span, layer, task % shape->num_kv_heads, row, end, q, width, out}, scratch.get());
    }
    if (table.thread_end) table.thread_end();
  });
}

int32_t baton_choose(const char* isa, const float* logits, int32_t n, int32_t greatest, const BatonChoice* choice) {
  return Chooser(*find_isa(isa), n).choose(logits, greatest, *choice);
}

void baton_rms_norm(const char* isa, const float* x, const float* weight, float eps, int32_t n, float* out) {
  find_isa(isa)->rms_norm(x, weight, eps, n, out);
}

void baton_swiglu(const char* isa, const float* gate_up, int32_t n, float* out) {
  find_isa(isa)->swiglu(gate_up, n, out);
}

void baton_rope(const char* isa, float* head, const float* cos_sin, int32_t head_dim) {
  find_isa(isa)->rope(head, cos_sin, head_dim);
}

void baton_store_kv(const char* isa, const float* values, int32_t format, int32_t head_dim, int32_t block_size,
                    int32_t slot, uint8_t* run) {
  find_isa(isa)->store_kv(values, format, head_dim, block_size, slot, run);
}
