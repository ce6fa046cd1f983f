#include "line.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <chrono>

#include "step.h"

namespace baton {
namespace {

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Line::Line(BatonProgram& program, BatonTeam& team)
    : program_(program),
      team_(team),
      choosers_(team.num_threads(), Chooser(program.isa, program.shape.vocab_size)),
      fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  thread_ = std::thread([this] { work(); });
}

Line::~Line() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
  }
  put_.notify_one();
  thread_.join();
  close(fd_);
}

void Line::put(BatonJob& job) {
  job.done = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(&job);
  }
  put_.notify_one();
}

void Line::wait(BatonJob& job) {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [&] { return job.done != 0; });
}

void Line::work() {
  for (;;) {
    BatonJob* job;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      put_.wait(lock, [this] { return closed_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = jobs_.front();
      jobs_.pop_front();
    }
    run(*job);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      __atomic_store_n(&job->done, 1, __ATOMIC_RELEASE);  // from now on it is the caller's
    }
    done_.notify_all();
    eventfd_write(fd_, 1);
  }
}

void Line::run(BatonJob& job) {
  job.began_s = now_s();
  for (int i = 0; i < job.num_sources; ++i) job.tokens[job.sources[i].row] = before_[job.sources[i].sampled];
  Step(program_, team_, job.batch).run(0);
  choose(job);
  before_.assign(job.chosen, job.chosen + job.batch.num_sampled);
  job.ended_s = now_s();
}

void Line::choose(BatonJob& job) {
  const BatonBatch& batch = job.batch;
  bool draws = false;
  for (int i = 0; i < batch.num_sampled; ++i) {
    job.chosen[i] = batch.argmax[i];
    job.greatest[i] = batch.logits[size_t(i) * program_.shape.vocab_size + batch.argmax[i]];
    draws |= job.choices[i].temperature != 0;
  }
  if (!draws) return;
  team_.run(batch.num_sampled, [&](int i, int thread) {
    const float* logits = batch.logits + size_t(i) * program_.shape.vocab_size;
    job.chosen[i] = choosers_[thread].choose(logits, batch.argmax[i], job.choices[i]);
  });
}

}  // namespace baton

BatonLine* baton_line_new(BatonProgram* program, BatonTeam* team) { return new BatonLine(*program, *team); }

int32_t baton_line_fd(const BatonLine* line) { return line->fd(); }

void baton_line_put(BatonLine* line, BatonJob* job) { line->put(*job); }

void baton_line_wait(BatonLine* line, BatonJob* job) { line->wait(*job); }

void baton_line_free(BatonLine* line) { delete line; }
