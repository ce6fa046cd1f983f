// One step in execution: a program, a team and a batch.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "program.h"
#include "team.h"

namespace baton {

// Rows of a step in parts, one unless rows are many: a thread keeps to its part, so that what it made of those rows lies
// in its own L2 when the next product reads it.
struct RowShares {
  int rows, each, count;

  RowShares(int rows, int num_threads);
  int end(int share) const { return std::min(rows, (share + 1) * each); }
};

class Step {
 public:
  Step(BatonProgram& program, BatonTeam& team, const BatonBatch& batch);
  ~Step();
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;
  // Runs from op `first` on; returns where it stopped.
  int run(int first);

 private:
  // Where a product goes.
  struct Target {
    float* y;
    int stride;
    bool accumulate;
  };
  // Units of a share that are taken, on a line of its own.
  struct alignas(64) Taken {
    std::atomic<int> units{0};
  };
  // The greatest logit that a thread has seen of a row.
  struct Greatest {
    float value = 0;
    int index = -1;  // none yet
    bool beats(const Greatest& other) const;
  };
  // Rows [begin, end) of a span.
  struct Item {
    const BatonSpan* span;
    int begin, end;
  };

  template <typename Body>
  void parallel(int num_tasks, Body&& body) {
    if (num_tasks > 1 && num_threads_ > 1) return team_.run(num_tasks, body);
    for (int task = 0; task < num_tasks; task++) body(task, 0);
  }
  // body(share, unit, thread) for `units` units of each share, begun in order. A thread takes those of its own share,
  // and then helps with the others.
  template <typename Body>
  void each_share(int shares, int units, Body&& body);
  void execute(const CompiledOp& op);
  ThreadSpace& space_of(int thread);
  void begin();
  void embed(const float* table);
  void prepare(const CompiledOp& op, int row, const Activations& out, ThreadSpace& space);
  void prepare_all(const CompiledOp& op, const RowShares& shares, const Activations& out);
  Activations rounded(const BatonMatrix& w) const;
  // Activations for `op` in place, however its rows are chunked; body(x, row, num_rows, panel, end, space) for each
  // chunk of rows and each run of `each` of the first `panels` panels.
  template <typename Body>
  void each_part(const CompiledOp& op, int panels, int each, Body&& body);
  void product(const CompiledOp& op, const Target& to);
  void head_product(const CompiledOp& op);
  void gated_product(const CompiledOp& op);
  void heads_product(const CompiledOp& op);
  void layer_is_stored(int layer);
  void list_attention_tasks();
  void attention(int layer);
  void keep_sampled_rows();

  BatonProgram& p_;
  BatonTeam& team_;
  const BatonBatch& batch_;
  const int num_threads_;
  std::vector<Item> items_;  // of attention, for each KV head
};

// A few tasks for each thread, so that one that is held up does not hold up the rest; in pairs of panels, because AMX
// takes two at once.
int panels_per_task(int panels, int num_threads);
// As torch.argmax has it: NaN is greater than all.
bool is_greater(float a, float b);
// Index of the first greatest of n >= 1 values.
int greatest(const float* values, int n);

}  // namespace baton
