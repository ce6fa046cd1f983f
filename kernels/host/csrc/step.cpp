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

constexpr size_t kFarBytes = 1 << 20;  // so many logits do not stay in L2
constexpr int kPreparedRows = 8;      // rows that one task makes activations of
constexpr int kLeastShareRows = 128;  // fewer would read weights faster than they come

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
      if (op.makes == Makes::kHeads) return heads_product(op);
      if (op.makes != Makes::kProduct) return gated_product(op);
      return product(op, {p_.wide.get(), op.matrix->n, false});
    case BATON_OP_LINEAR_RESIDUAL: return product(op, {p_.hidden.get(), p_.shape.hidden_size, true});
    case BATON_OP_LM_HEAD: return head_product(op);
    case BATON_OP_ATTENTION: return attention(op.layer);
    case BATON_OP_KEEP_SAMPLED_ROWS: return keep_sampled_rows();
    case BATON_OP_EMBED: return embed(op.vector);
    case BATON_OP_RMS_NORM:
    case BATON_OP_SWIGLU:
    case BATON_OP_ROPE_WRITE_KV:  // by the product after or before
    case BATON_OP_COLLECTIVE:
    case BATON_OP_CAPTURE: return;
  }
}

// Angles and place of every row, and zeros in each block that this step begins but does not fill: what a block's bytes are must
// depend on its tokens alone.
void Step::begin() {
  p_.rows = batch_.num_rows;
  const BatonShape& s = p_.shape;
  const int half = s.head_dim / 2;
  parallel(batch_.num_spans, [&](int task, int) {
    const BatonSpan& span = batch_.spans[task];
    for (int i = 0; i < span.num_rows; i++) {
      const int position = span.start + i, block = batch_.blocks[span.first_block + position / s.block_size];
      p_.slots[span.row + i] = {batch_.pool + block * block_bytes(s), position % s.block_size};
      float* cos_sin = &p_.rotation[size_t(span.row + i) * s.head_dim];
      for (int j = 0; j < half; j++) {
        const float angle = float(position) * s.rope_frequencies[j];
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

// A token that the vocabulary lacks is no number: nothing beyond the table is read, and its sequence fails, alone.
void Step::embed(const float* table) {
  const size_t size = p_.shape.hidden_size;
  for (int row = 0; row < p_.rows; row++) {
    const int32_t token = batch_.tokens[row];
    float* hidden = &p_.hidden[row * size];
    if (token >= 0 && token < p_.shape.vocab_size)
      std::memcpy(hidden, &table[token * size], size * sizeof(float));
    else
      std::fill(hidden, hidden + size, NAN);
  }
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
    x = &(op.source == Source::kGated ? p_.wide : p_.mixed)[size_t(row) * out.k];
  p_.isa.to_activation(x, out, row, space.row.get());
}

// Rounded activations of `w`, in `wide`.
Activations Step::rounded(const BatonMatrix& w) const {
  return {p_.wide.get(), nullptr, nullptr, nullptr, w.k, activation_stride(w.k, w.format), w.format};
}

RowShares::RowShares(int rows, int num_threads) : rows(rows) {
  const int most = std::max(1, std::min(num_threads, rows / kLeastShareRows));
  each = (std::max(rows, 1) + most - 1) / most;
  each = (each + 31) / 32 * 32;  // in pairs of AMX tiles
  count = std::max(1, (rows + each - 1) / each);
}

template <typename Body>
void Step::each_share(int shares, int units, Body&& body) {
  if (shares == 1) return parallel(units, [&](int unit, int thread) { body(0, unit, thread); });
  std::vector<Taken> taken(shares);
  parallel(shares * units, [&](int, int thread) {
    for (int share = thread * shares / num_threads_;; share = (share + 1) % shares) {
      const int unit = taken[share].units.fetch_add(1, std::memory_order_relaxed);
      if (unit < units) return body(share, unit, thread);
    }
  });
}

void Step::prepare_all(const CompiledOp& op, const RowShares& shares, const Activations& out) {
  const int units = (std::min(p_.rows, shares.each) + kPreparedRows - 1) / kPreparedRows;
  each_share(shares.count, units, [&](int share, int unit, int thread) {
    const int begin = share * shares.each + unit * kPreparedRows;
    const int end = std::min(begin + kPreparedRows, shares.end(share));
    for (int row = begin; row < end; row++) prepare(op, row, out, p_.threads[thread]);
  });
}

template <typename Body>
void Step::each_part(const CompiledOp& op, int panels, int each, Body&& body) {
  const BatonMatrix& w = *op.matrix;
  const bool made = op.source == Source::kRounded;
  const bool own = !made && p_.rows <= kOwnRows && p_.rows * padded(w.k) <= kOwnElements;
  const Activations shared = made ? rounded(w) : p_.activations.view(w.k, w.format);
  const RowShares shares(p_.rows, num_threads_);
  if (!own && !made) prepare_all(op, shares, shared);
  p_.products++;
  const size_t row_bytes = size_t(padded(w.k)) * element_bytes(w.format);
  const int chunk = std::min(kChunkRows, std::max(kChunkRows / 8, int(kChunkBytes / row_bytes) / 32 * 32));
  const int chunks = (std::min(p_.rows, shares.each) + chunk - 1) / chunk;
  // Threads that have the same rows have panels that follow each other, whose weights a product fetches ahead.
  const int groups = std::max(1, num_threads_ / shares.count), runs = (panels + each * groups - 1) / (each * groups);
  // Chunks one after the other, so that all threads of a share work on the same one: it stays in L2 for all its panels.
  each_share(shares.count * groups, chunks * runs, [&](int share, int unit, int thread) {
    ThreadSpace& space = space_of(thread);
    const Activations x = own ? space.activations.view(w.k, w.format) : shared;
    if (own && space.prepared != p_.products) {
      for (int row = 0; row < p_.rows; row++) prepare(op, row, x, space);
      space.prepared = p_.products;
    }
    const int rows = share / groups, row = rows * shares.each + unit / runs * chunk;
    const int num_rows = std::min(chunk, shares.end(rows) - row), panel = (share % groups * runs + unit % runs) * each;
    if (num_rows > 0 && panel < panels)
      body(from_row(x, row), row, num_rows, panel, std::min(panel + each, panels), space);
  });
}

void Step::product(const CompiledOp& op, const Target& to) {
  const int panels = num_panels(op.matrix->n), each = panels_per_task(panels, num_threads_);
  each_part(op, panels, each, [&](const Activations& x, int row, int num_rows, int panel, int end, ThreadSpace&) {
    p_.isa.linear({x, op.matrix, to.y + size_t(row) * to.stride, num_rows, to.stride, to.accumulate}, panel, end);
  });
}

// Gate and up of the same columns in one task, which makes one number of each two while they are in L2: with many
// rows, writing both to memory and reading them again would take longer than multiplying. If the product that reads
// them wants them only rounded, that is done here too.
void Step::gated_product(const CompiledOp& op) {
  const BatonMatrix& w = *op.matrix;
  const int half = num_panels(w.n) / 2, each = std::min(panels_per_task(half, num_threads_), kGatedPanels);
  each_part(op, half, each, [&](const Activations& x, int row, int num_rows, int panel, int end, ThreadSpace& space) {
    const int width = (end - panel) * kPanel;
    float* gate = space.columns.get();
    p_.isa.linear({x, &w, gate, num_rows, 2 * width, false, panel}, panel, end);
    p_.isa.linear({x, &w, gate + width, num_rows, 2 * width, false, half + panel}, half + panel, half + end);
    if (op.makes == Makes::kGated) {
      for (int i = 0; i < num_rows; i++)
        p_.isa.swiglu(&gate[i * 2 * width], width, &p_.wide[size_t(row + i) * w.n / 2 + panel * kPanel]);
      return;
    }
    Activations out = rounded(*op.reader);
    const int padding = end == half ? padded(out.k) - out.k : 0;  // the last columns' task writes the zeros after them
    for (int i = 0; i < num_rows; i++) {
      const size_t at = size_t(row + i) * out.stride + panel * kPanel;
      uint8_t* part = static_cast<uint8_t*>(out.data) + at * element_bytes(out.format);
      p_.isa.swiglu(&gate[i * 2 * width], width, space.row.get());
      p_.isa.to_activation(space.row.get(), {part, nullptr, nullptr, nullptr, width, width + padding, out.format}, 0,
                           nullptr);
    }
  });
}

// q, k and v, a head a task, which rotates it while it is in L2. q goes to `wide`, k and v into the pool.
void Step::heads_product(const CompiledOp& op) {
  const BatonShape& s = p_.shape;
  const int dim = s.head_dim, each = dim / kPanel, num_rotated = s.num_heads + s.num_kv_heads;
  each_part(op, num_panels(op.matrix->n), each,
            [&](const Activations& x, int row, int num_rows, int panel, int end, ThreadSpace& space) {
    const int head = panel / each, stride = head < s.num_heads ? s.num_heads * dim : dim;
    float* out = head < s.num_heads ? &p_.wide[size_t(row) * stride + head * dim] : space.columns.get();
    p_.isa.linear({x, op.matrix, out, num_rows, stride, false, panel}, panel, end);
    for (int i = 0; i < num_rows; i++, out += stride) {
      if (head < num_rotated) p_.isa.rope(out, &p_.rotation[size_t(row + i) * dim], dim);
      if (head < s.num_heads) continue;
      const Slot& slot = p_.slots[row + i];
      const int kv_head = (head - s.num_heads) % s.num_kv_heads, k_or_v = head >= num_rotated;
      const size_t run = (size_t(op.layer) * s.num_kv_heads + kv_head) * 2 + k_or_v;
      p_.isa.store_kv(out, s.kv_format, dim, s.block_size, slot.index, slot.block + run * run_bytes(s));
    }
  });
  layer_is_stored(op.layer);
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

// A thread knows what it takes next, so that a task can fetch the beginning of it.
void Step::attention(int layer) {
  const BatonShape& s = p_.shape;
  const int num_tasks = int(items_.size()) * s.num_kv_heads, shares = std::max(1, std::min(num_threads_, num_tasks));
  const auto task_of = [&](int task) {
    const Item& item = items_[task / s.num_kv_heads];
    return AttentionTask{&s, &batch_, item.span, layer, task % s.num_kv_heads, item.begin, item.end, p_.wide.get(),
                         s.num_heads * s.head_dim, p_.mixed.get()};
  };
  each_share(shares, (num_tasks + shares - 1) / shares, [&](int share, int unit, int thread) {
    const int number = unit * shares + share;
    if (number >= num_tasks) return;
    AttentionTask task = task_of(number), next;
    if (number + shares < num_tasks) next = task_of(number + shares), task.next = &next;
    p_.isa.attention(task, space_of(thread).attention.get());
  });
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

// A few columns at once into the thread's own room, from where they go to memory while their greatest are looked up.
void Step::head_product(const CompiledOp& op) {
  const int n = op.matrix->n;
  const bool far = size_t(p_.rows) * n * sizeof(float) > kFarBytes;
  std::vector<Greatest> found(size_t(num_threads_) * p_.rows);
  each_part(op, num_panels(n), kHeadPanels,
            [&](const Activations& x, int row, int num_rows, int panel, int end, ThreadSpace& space) {
    const int begin = panel * kPanel, width = std::min(end * kPanel, n) - begin, stride = (end - panel) * kPanel;
    p_.isa.linear({x, op.matrix, space.columns.get(), num_rows, stride, false, panel}, panel, end);
    Greatest* best = &found[size_t(&space - p_.threads.data()) * p_.rows + row];
    for (int i = 0; i < num_rows; i++) {
      const float* values = &space.columns[size_t(i) * stride];
      const float most = p_.isa.keep_logits(values, width, far, &batch_.logits[size_t(row + i) * n + begin]);
      if (!batch_.argmax || best[i].beats({most, begin})) continue;
      best[i] = {most, begin + greatest(values, width)};
    }
  });
  for (int r = 0; batch_.argmax && r < p_.rows; r++) {
    Greatest best;
    for (int thread = 0; thread < num_threads_; thread++) {
      const Greatest& other = found[size_t(thread) * p_.rows + r];
      if (other.beats(best)) best = other;
    }
    batch_.argmax[r] = best.index;
  }
}

// The first of equals is the greater.
bool Step::Greatest::beats(const Greatest& other) const {
  if (index < 0 || other.index < 0) return index >= 0;
  if (is_greater(value, other.value)) return true;
  return !is_greater(other.value, value) && index < other.index;
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
