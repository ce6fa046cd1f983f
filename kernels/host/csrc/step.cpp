// Executes the ops of a program over one batch, phase after phase, on a team of threads.
//
// A phase is a set of tasks that any thread may take in any order; the next one begins when all are done. Tasks split
// columns, heads and rows, never k and never the keys of a row: how many threads there are changes no bit.
#include "step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "pack.h"

namespace baton {
namespace {

constexpr int kArgmaxChunk = 8192;  // columns of one task

// The rows from `row` on.
Activations from_row(Activations x, int row) {
  x.data = static_cast<uint8_t*>(x.data) + size_t(row) * x.stride * element_bytes(x.format);
  if (x.format == BATON_INT8) {
    x.scales += row;
    x.totals += row;
  } else if (x.format == BATON_INT4) {
    x.scales += size_t(row) * (x.stride / kGroup);
    x.sums += size_t(row) * (x.stride / kGroup);
  }
  return x;
}

}  // namespace

int panels_per_task(int panels, int num_threads) { return std::max(2, panels / (4 * num_threads) / 2 * 2); }

Step::Step(BatonProgram& program, BatonTeam& team, const BatonBatch& batch)
    : p_(program), team_(team), batch_(batch), num_threads_(team.num_threads()) {
  p_.reserve(batch.num_rows, num_threads_);
  p_.steps++;
}

// Workers keep what `thread_begin` set up until the next step sets it up again: nothing else runs on them.
Step::~Step() {
  if (p_.isa.thread_end) p_.isa.thread_end();
}

int Step::run(int op) {
  using Clock = std::chrono::steady_clock;
  const int num_ops = int(p_.ops.size());
  if (op == 0) begin();
  list_attention_tasks();
  for (; op < num_ops; op++) {
    const CompiledOp& now = p_.ops[op];
    if (now.kind == BATON_OP_COLLECTIVE || now.kind == BATON_OP_CAPTURE) return op;
    if (now.kind == BATON_OP_KEEP_SAMPLED_ROWS && batch_.num_sampled == 0) return num_ops;
    const Clock::time_point began = p_.seconds ? Clock::now() : Clock::time_point();
    execute(now);
    if (p_.seconds) p_.seconds[op] += std::chrono::duration<double>(Clock::now() - began).count();
  }
  return op;
}

void Step::execute(const CompiledOp& op) {
  switch (op.kind) {
    case BATON_OP_LINEAR:
      if (op.gated) return gated_product(op);
      return product(op, {p_.wide.get(), op.matrix->n, false});
    case BATON_OP_LINEAR_RESIDUAL: return product(op, {p_.hidden.get(), p_.shape.hidden_size, true});
    case BATON_OP_LM_HEAD:
      product(op, {batch_.logits, op.matrix->n, false});
      if (batch_.argmax) argmax();
      return;
    case BATON_OP_ROPE_WRITE_KV: return rotate_and_store(op.layer);
    case BATON_OP_ATTENTION: return attention(op.layer);
    case BATON_OP_KEEP_SAMPLED_ROWS: return keep_sampled_rows();
    case BATON_OP_EMBED: return embed(op.vector);
    case BATON_OP_RMS_NORM:
    case BATON_OP_SWIGLU:  // by the product that reads x
    case BATON_OP_COLLECTIVE:
    case BATON_OP_CAPTURE: return;
  }
}

// Angles of every row, and zeros in each block that this step begins but does not fill: what a block's bytes are must
// depend on its tokens alone.
void Step::begin() {
  p_.rows = batch_.num_rows;
  const BatonShape& s = p_.shape;
  const int half = s.head_dim / 2;
  parallel(batch_.num_spans, [&](int task, int) {
    const BatonSpan& span = batch_.spans[task];
    for (int i = 0; i < span.num_rows; i++) {
      float* cos_sin = &p_.rotation[size_t(span.row + i) * s.head_dim];
      for (int j = 0; j < half; j++) {
        const float angle = float(span.start + i) * s.rope_frequencies[j];
        cos_sin[j] = std::cos(angle);
        cos_sin[half + j] = std::sin(angle);
      }
    }
    const int end = span.start + span.num_rows, tail = end - end % s.block_size;
    if (tail < end && span.start <= tail) {
      const size_t size = block_bytes(s);
      std::memset(batch_.pool + size * batch_.blocks[span.first_block + end / s.block_size], 0, size);
    }
  });
}

void Step::embed(const float* table) {
  const size_t size = p_.shape.hidden_size;
  for (int row = 0; row < p_.rows; row++)
    std::memcpy(&p_.hidden[row * size], &table[batch_.tokens[row] * size], size * sizeof(float));
}

ThreadSpace& Step::space_of(int thread) {
  ThreadSpace& space = p_.threads[thread];
  if (space.begun != p_.steps && p_.isa.thread_begin) p_.isa.thread_begin();
  space.begun = p_.steps;
  return space;
}

// Row `row` of what `op` reads, into `out`, rounded; `space` is the calling thread's.
void Step::prepare(const CompiledOp& op, int row, const Activations& out, ThreadSpace& space) {
  const float* x = space.row.get();
  if (op.source == Source::kNorm)
    p_.isa.rms_norm(&p_.hidden[size_t(row) * p_.shape.hidden_size], op.vector, op.eps, out.k, space.row.get());
  else if (op.source == Source::kSwiglu)
    p_.isa.swiglu(&p_.wide[size_t(row) * 2 * out.k], out.k, space.row.get());
  else
    x = &(op.source == Source::kWide ? p_.wide : p_.mixed)[size_t(row) * out.k];
  p_.isa.to_activation(x, out, row, space.row.get());
}

template <typename Body>
void Step::each_part(const CompiledOp& op, int panels, int most, Body&& body) {
  const BatonMatrix& w = *op.matrix;
  const bool own = p_.rows <= kOwnRows && p_.rows * padded(w.k) <= kOwnElements;
  if (!own) {
    const Activations shared = p_.activations.view(w.k, w.format);
    parallel(p_.rows, [&](int row, int thread) { prepare(op, row, shared, p_.threads[thread]); });
  }
  p_.products++;
  const int each = std::min(panels_per_task(panels, num_threads_), most), runs = (panels + each - 1) / each;
  const size_t row_bytes = size_t(padded(w.k)) * element_bytes(w.format);
  const int chunk = std::min(kChunkRows, std::max(kChunkRows / 8, int(kChunkBytes / row_bytes) / 32 * 32));
  const int chunks = (p_.rows + chunk - 1) / chunk;
  // Chunks one after the other, so that all threads work on the same one: it stays in L2 for all its panels.
  parallel(chunks * runs, [&](int task, int thread) {
    ThreadSpace& space = space_of(thread);
    const Activations x = (own ? space.activations : p_.activations).view(w.k, w.format);
    if (own && space.prepared != p_.products) {
      for (int row = 0; row < p_.rows; row++) prepare(op, row, x, space);
      space.prepared = p_.products;
    }
    const int row = task / runs * chunk, panel = task % runs * each;
    body(from_row(x, row), row, std::min(chunk, p_.rows - row), panel, std::min(panel + each, panels), space);
  });
}

void Step::product(const CompiledOp& op, const Target& to) {
  const int panels = num_panels(op.matrix->n);
  each_part(op, panels, panels, [&](const Activations& x, int row, int num_rows, int panel, int end, ThreadSpace&) {
    p_.isa.linear({x, op.matrix, to.y + size_t(row) * to.stride, num_rows, to.stride, to.accumulate}, panel, end);
  });
}

// Gate and up of the same columns in one task, which makes one number of each two while they are in L2: with many
// rows, writing both to memory and reading them again would take longer than multiplying.
void Step::gated_product(const CompiledOp& op) {
  const BatonMatrix& w = *op.matrix;
  const int half = num_panels(w.n) / 2;
  each_part(op, half, kGatedPanels,
            [&](const Activations& x, int row, int num_rows, int panel, int end, ThreadSpace& space) {
    const int width = (end - panel) * kPanel;
    float* gate = space.gate_up.get();
    p_.isa.linear({x, &w, gate, num_rows, 2 * width, false, panel}, panel, end);
    p_.isa.linear({x, &w, gate + width, num_rows, 2 * width, false, half + panel}, half + panel, half + end);
    for (int i = 0; i < num_rows; i++)
      p_.isa.swiglu(&gate[i * 2 * width], width, &p_.wide[size_t(row + i) * w.n / 2 + panel * kPanel]);
  });
}

uint8_t* Step::run_of(int block, int layer, int kv_head, int k_or_v) const {
  const BatonShape& s = p_.shape;
  const size_t run = (size_t(layer) * s.num_kv_heads + kv_head) * 2 + k_or_v;
  return batch_.pool + block * block_bytes(s) + run * run_bytes(s);
}

// Row i of `span`: the query heads of one KV head and its key are rotated in place, key and value go into the pool.
void Step::rotate_and_store_head(const BatonSpan& span, int i, int layer, int kv_head) {
  const BatonShape& s = p_.shape;
  const int group = s.num_heads / s.num_kv_heads, dim = s.head_dim, position = span.start + i;
  float* heads = &p_.wide[size_t(span.row + i) * (s.num_heads + 2 * s.num_kv_heads) * dim];
  const float* cos_sin = &p_.rotation[size_t(span.row + i) * dim];
  for (int head = kv_head * group; head < (kv_head + 1) * group; head++) p_.isa.rope(&heads[head * dim], cos_sin, dim);
  float* key = &heads[(s.num_heads + kv_head) * dim];
  p_.isa.rope(key, cos_sin, dim);
  const int block = batch_.blocks[span.first_block + position / s.block_size], slot = position % s.block_size;
  const float* value = key + s.num_kv_heads * dim;
  p_.isa.store_kv(key, s.kv_format, dim, s.block_size, slot, run_of(block, layer, kv_head, 0));
  p_.isa.store_kv(value, s.kv_format, dim, s.block_size, slot, run_of(block, layer, kv_head, 1));
}

// A step of few rows of one sequence does this as part of each attention task: nobody else reads what the task writes.
bool Step::stores_in_attention() const { return batch_.num_spans == 1 && items_.size() == 1; }

void Step::rotate_and_store(int layer) {
  if (stores_in_attention()) return;
  constexpr int kRows = 8;  // of one task
  stores_.clear();
  for (int i = 0; i < batch_.num_spans; i++)
    for (int row = 0; row < batch_.spans[i].num_rows; row += kRows)
      stores_.push_back({&batch_.spans[i], row, std::min(row + kRows, batch_.spans[i].num_rows)});
  parallel(int(stores_.size()), [&](int task, int) {
    const Item& item = stores_[task];
    for (int i = item.begin; i < item.end; i++)
      for (int head = 0; head < p_.shape.num_kv_heads; head++) rotate_and_store_head(*item.span, i, layer, head);
  });
  layer_is_stored(layer);
}

void Step::layer_is_stored(int layer) {
  if (batch_.layers_done) __atomic_store_n(batch_.layers_done, layer + 1, __ATOMIC_RELEASE);
}

// The longest first: what is begun last should be short.
void Step::list_attention_tasks() {
  items_.clear();
  for (int i = 0; i < batch_.num_spans; i++) {
    const BatonSpan& span = batch_.spans[i];
    for (int row = 0; row < span.num_rows; row += p_.isa.attention_rows)
      items_.push_back({&span, row, std::min(row + p_.isa.attention_rows, span.num_rows)});
  }
  std::stable_sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) {
    return int64_t(a.span->start + a.end) * (a.end - a.begin) > int64_t(b.span->start + b.end) * (b.end - b.begin);
  });
}

void Step::attention(int layer) {
  const BatonShape& s = p_.shape;
  const bool store = stores_in_attention();
  parallel(int(items_.size()) * s.num_kv_heads, [&](int task, int thread) {
    const Item& item = items_[task / s.num_kv_heads];
    const int head = task % s.num_kv_heads;
    if (store)
      for (int i = item.begin; i < item.end; i++) rotate_and_store_head(*item.span, i, layer, head);
    p_.isa.attention({&s, &batch_, item.span, layer, head, item.begin, item.end, p_.wide.get(),
                      (s.num_heads + 2 * s.num_kv_heads) * s.head_dim, p_.mixed.get()},
                     space_of(thread).attention.get());
  });
  if (store) layer_is_stored(layer);
}

void Step::keep_sampled_rows() {
  const size_t hidden = p_.shape.hidden_size, mixed = size_t(p_.shape.num_heads) * p_.shape.head_dim;
  for (int i = 0; i < batch_.num_sampled; i++) {  // rows rise: what is overwritten has been moved or is not wanted
    const size_t row = batch_.sampled_rows[i];
    std::memmove(&p_.hidden[i * hidden], &p_.hidden[row * hidden], hidden * sizeof(float));
    std::memmove(&p_.mixed[i * mixed], &p_.mixed[row * mixed], mixed * sizeof(float));
  }
  p_.rows = batch_.num_sampled;
}

void Step::argmax() {
  const int n = p_.shape.vocab_size, chunks = (n + kArgmaxChunk - 1) / kArgmaxChunk;
  std::vector<int32_t> best(size_t(p_.rows) * chunks);
  parallel(int(best.size()), [&](int task, int) {
    const int from = task % chunks * kArgmaxChunk;
    const float* row = batch_.logits + size_t(task / chunks) * n;
    best[task] = from + greatest(row + from, std::min(kArgmaxChunk, n - from));
  });
  for (int r = 0; r < p_.rows; r++) {
    const float* row = batch_.logits + size_t(r) * n;
    int32_t winner = best[size_t(r) * chunks];
    for (int c = 1; c < chunks; c++) {
      const int32_t other = best[size_t(r) * chunks + c];
      if (is_greater(row[other], row[winner])) winner = other;
    }
    batch_.argmax[r] = winner;
  }
}

bool is_greater(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// Block by block: independent maxima, which a compiler turns into vectors; then the first place in the best block.
int greatest(const float* values, int n) {
  constexpr int kBlock = 512, kLanes = 16;
  float best = values[0];
  int where = 0;
  for (int begin = 0; begin < n; begin += kBlock) {
    const float* block = values + begin;
    const int size = std::min(kBlock, n - begin), whole = size / kLanes * kLanes;
    float most[kLanes];
    int32_t odd[kLanes] = {};
    std::fill(most, most + kLanes, block[0]);
    for (int i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kLanes; j++) {
        most[j] = block[i + j] > most[j] ? block[i + j] : most[j];
        odd[j] |= block[i + j] != block[i + j];
      }
    for (int i = whole; i < size; i++) {
      most[0] = block[i] > most[0] ? block[i] : most[0];
      odd[0] |= block[i] != block[i];
    }
    if (std::any_of(odd, odd + kLanes, [](int32_t o) { return o != 0; }))
      return int(std::find_if(block, block + size, [](float v) { return v != v; }) - values);
    const float top = *std::max_element(most, most + kLanes);
    if (top > best) best = top, where = begin;
  }
  return int(std::find(values + where, values + n, best) - values);
}

}  // namespace baton
