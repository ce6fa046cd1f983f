// The threads of a step. Owns N - 1 worker threads; the caller is the N-th. Does not know what the tasks do.
//
// Life of a phase:
// 1. `run` publishes it: what to call, and how many tasks are left, in one word together with the phase's number.
// 2. Everybody, the caller too, takes tasks from that word, one compare-and-swap each. Whoever comes late finds none
//    left and waits for the next phase.
// 3. The caller returns when every task has *ended*. It never waits for a thread to arrive, so on a machine with more
//    runnable threads than cores a worker that does not get a core costs nothing: the others do its share.
//
// Waiting spins for `spin_us`, since the next phase of a step is microseconds away, then sleeps on a futex: nobody
// burns a core between steps, and two teams on one core do not starve each other.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

#include "abi.h"

namespace baton {

// Does task `task` of a phase; `thread` is 0 for the caller, else 1 ... num_threads - 1.
using Work = void (*)(void* context, int task, int thread);

class Team {
 public:
  Team(int num_threads, int spin_us);
  // Waits for the threads to end. No phase may be running.
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Tasks 0 ... num_tasks - 1, begun in that order, each once; all have ended, and what they wrote is visible, on
  // return. One caller at a time; tasks must not call it.
  void run(Work work, void* context, int num_tasks);

  // The same for anything that can be called as body(task, thread).
  template <typename Body>
  void run(int num_tasks, Body&& body) {
    using Kept = std::remove_reference_t<Body>;
    run([](void* kept, int task, int thread) { (*static_cast<Kept*>(kept))(task, thread); }, &body, num_tasks);
  }

 private:
  void work_until_closed(int thread);
  void take_tasks(int thread);
  void await_phase_after(uint32_t phase);
  void await_tasks();

  // What the running phase is: written before it is published, left alone while a task of it is not ended.
  Work work_ = nullptr;
  void* context_ = nullptr;
  int num_tasks_ = 0;

  // Words that different threads write lie on lines of their own.
  alignas(64) std::atomic<uint64_t> open_{0};      // phase << 32 | tasks that nobody has taken yet
  alignas(64) std::atomic<uint32_t> phase_{0};     // futex of the workers
  alignas(64) std::atomic<uint32_t> running_{0};   // futex of the caller: tasks of this phase that have not ended
  alignas(64) std::atomic<uint32_t> sleepers_{0};  // workers that must be woken
  std::atomic<uint32_t> caller_sleeps_{0};
  std::atomic<bool> closed_{false};
  int spin_us_;
  std::vector<std::thread> threads_;
};

}  // namespace baton

struct BatonTeam : baton::Team {
  using Team::Team;
};
