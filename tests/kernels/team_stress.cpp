// Phases of random sizes on teams of many threads: every task is run once, by a thread that has no other one, and what
// it wrote is there when the phase is over; and sleeping threads do come. Compiled and run by test_host_team.py; says
// what is wrong and exits 1, or hangs.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "team.h"

namespace {

constexpr int kMostTasks = 300;

void require(bool holds, const char* what, int phase) {
  if (holds) return;
  std::fprintf(stderr, "%s (phase %d)\n", what, phase);
  std::exit(1);
}

void stress(int num_threads, int spin_us, int num_phases) {
  std::mt19937 random(static_cast<unsigned>(num_threads * 1000 + spin_us));
  baton::Team team(num_threads, spin_us);
  require(team.num_threads() == num_threads, "the team has another size", 0);
  const auto busy = std::make_unique<std::atomic<int>[]>(static_cast<size_t>(num_threads));
  std::vector<int> runs(kMostTasks);
  for (int phase = 0; phase < num_phases; ++phase) {
    const int num_tasks = phase % 3 ? static_cast<int>(random() % 8) : static_cast<int>(random() % kMostTasks);
    const int slow = static_cast<int>(random() % 20) ? -1 : static_cast<int>(random() % kMostTasks);
    std::fill(runs.begin(), runs.end(), 0);
    team.run(num_tasks, [&](int task, int thread) {
      require(thread >= 0 && thread < num_threads, "no such thread", phase);
      require(busy[thread].fetch_add(1) == 0, "one thread runs two tasks", phase);
      for (volatile int i = 0; task == slow && i < 20000;) i = i + 1;
      ++runs[task];  // not atomic: the team orders it
      busy[thread].fetch_sub(1);
    });
    for (int task = 0; task < kMostTasks; ++task)
      require(runs[task] == (task < num_tasks), task < num_tasks ? "a task was not run once" : "a task too many", phase);
  }
}

// Each task waits for all others: nobody can have two, so every thread must take part.
void gather(int num_threads, int spin_us) {
  baton::Team team(num_threads, spin_us);
  for (int phase = 0; phase < 50; ++phase) {
    std::atomic<int> begun{0};
    team.run(num_threads, [&](int, int) {
      begun.fetch_add(1);
      while (begun.load() < num_threads) std::this_thread::yield();
    });
    if (phase % 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // long enough for all to fall asleep
  }
}

}  // namespace

int main() {
  for (int num_threads : {1, 2, 3, 8})
    for (int spin_us : {0, 1, 20}) {
      stress(num_threads, spin_us, 3000);
      gather(num_threads, spin_us);
    }
  for (int i = 0; i < 100; ++i) baton::Team(1 + i % 5, i % 2 * 20);  // ended as soon as begun
  return 0;
}
