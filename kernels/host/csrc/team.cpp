#include "team.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace baton {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex is a plain word");

// Sleeps while the word is `value`; may return early.
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

// True as soon as `done` is; false after spin_us. The clock is read once per 64 pauses: it costs more than one.
template <typename Done>
bool spin(int spin_us, Done done) {
  const auto begin = std::chrono::steady_clock::now();
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause();
    }
    if (std::chrono::steady_clock::now() - begin >= std::chrono::microseconds(spin_us)) return false;
  }
}

}  // namespace

Team::Team(int num_threads, int spin_us) : spin_us_(spin_us) {
  for (int thread = 1; thread < num_threads; ++thread)
    threads_.emplace_back([this, thread] { work_until_closed(thread); });
}

Team::~Team() {
  closed_.store(true);
  phase_.fetch_add(1);
  wake_all(phase_);
  for (std::thread& thread : threads_) thread.join();
}

void Team::run(Work work, void* context, int num_tasks) {
  if (threads_.empty() || num_tasks <= 1) {  // nobody to share with
    for (int task = 0; task < num_tasks; ++task) work(context, task, 0);
    return;
  }
  work_ = work;
  context_ = context;
  num_tasks_ = num_tasks;
  running_.store(static_cast<uint32_t>(num_tasks), std::memory_order_relaxed);
  const uint32_t phase = phase_.load(std::memory_order_relaxed) + 1;
  open_.store(static_cast<uint64_t>(phase) << 32 | static_cast<uint32_t>(num_tasks), std::memory_order_release);
  // Either a worker that goes to sleep sees the new phase, or we see the worker: both orders are total.
  phase_.store(phase, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) && sleepers_.exchange(0)) wake_all(phase_);
  take_tasks(0);
  await_tasks();
}

void Team::take_tasks(int thread) {
  uint64_t open = open_.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(open)) {
    // Having taken a task, the phase cannot end before we end it: what describes it stays. The word tells phases
    // apart, so a swap never takes a task of another phase than the one that was looked at.
    if (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acquire)) continue;
    work_(context_, num_tasks_ - static_cast<int>(static_cast<uint32_t>(open)), thread);
    if (running_.fetch_sub(1, std::memory_order_seq_cst) == 1 && caller_sleeps_.load(std::memory_order_seq_cst))
      wake_all(running_);
    open = open_.load(std::memory_order_acquire);
  }
}

void Team::await_tasks() {
  const auto ended = [this] { return running_.load(std::memory_order_acquire) == 0; };
  if (spin(spin_us_, ended)) return;
  caller_sleeps_.store(1, std::memory_order_seq_cst);
  for (uint32_t left; (left = running_.load(std::memory_order_seq_cst)) != 0;) sleep_while(running_, left);
  caller_sleeps_.store(0, std::memory_order_relaxed);
}

void Team::await_phase_after(uint32_t phase) {
  const auto begun = [this, phase] { return phase_.load(std::memory_order_seq_cst) != phase; };
  if (spin(spin_us_, begun)) return;
  while (!begun()) {
    sleepers_.fetch_add(1, std::memory_order_seq_cst);  // whoever wakes us resets it
    if (!begun()) sleep_while(phase_, phase);
  }
}

void Team::work_until_closed(int thread) {
  for (uint32_t phase = 0;;) {
    await_phase_after(phase);
    if (closed_.load()) return;
    phase = phase_.load(std::memory_order_acquire);
    take_tasks(thread);
  }
}

}  // namespace baton

BatonTeam* baton_team_new(int32_t num_threads, int32_t spin_us) {
  return new BatonTeam(std::max(1, num_threads), spin_us);
}

void baton_team_free(BatonTeam* team) { delete team; }
