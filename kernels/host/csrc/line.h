// A line of steps: a thread that takes one job after the other, so that no step waits for the interpreter that put it.
//
// Life of a job:
// 1. `put`: queued.
// 2. The line's thread writes the tokens that the job before it chose into its batch, runs the step on the team, and
//    chooses a token for each row that is sampled.
// 3. Done: the eventfd says so, `wait` returns. By then the next job, if there is one, is being computed.
#pragma once
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "choose.h"
#include "program.h"
#include "team.h"

namespace baton {

class Line {
 public:
  Line(BatonProgram& program, BatonTeam& team);
  ~Line();
  Line(const Line&) = delete;
  Line& operator=(const Line&) = delete;

  int fd() const { return fd_; }
  void put(BatonJob& job);
  void wait(BatonJob& job);

 private:
  void work();
  void run(BatonJob& job);
  void choose(BatonJob& job);

  BatonProgram& program_;
  BatonTeam& team_;
  std::vector<int32_t> before_;    // what the job before chose
  std::vector<Chooser> choosers_;  // one per thread of the team
  std::mutex mutex_;
  std::condition_variable put_, done_;
  std::deque<BatonJob*> jobs_;
  bool closed_ = false;
  const int fd_;
  std::thread thread_;
};

}  // namespace baton

struct BatonLine : baton::Line {
  using Line::Line;
};
