// From a row of logits to a token: what engine/sampler.py does for rows without penalties or biases.
//
// Life of a row:
// 1. Temperature 0: the greatest logit, and that is all.
// 2. Every token gets a weight e^((logit - greatest) / temperature).
// 3. With a filter, the likely ones are collected, by a bound that falls until enough of them are above it, and the
//    filters are applied to these alone: nearly the whole vocabulary is never sorted.
// 4. A draw, which depends on seed, position and choice alone, picks one by the running sum of weights, in the order of token ids.
//
// Sums are made in one order that depends on nothing but the row.
#pragma once
#include <cstdint>
#include <vector>

#include "isa.h"

namespace baton {

// In [0, 1), 53 random bits: Philox 4x64-10 (Salmon et al. 2011) at the counter of this choice at this position.
double uniform(uint64_t seed, uint64_t position, uint64_t choice);

// Keeps its buffers from row to row: one per thread.
class Chooser {
 public:
  Chooser(const Isa& isa, int vocab_size) : isa_(isa), n_(vocab_size) {}
  int32_t choose(const float* logits, int32_t greatest, const BatonChoice& how);

 private:
  struct Candidate {
    float weight;
    int32_t id;
  };

  double sum_all();
  int32_t draw_from_all(double draw);
  void collect(const BatonChoice& how);
  void filter(const BatonChoice& how);
  int32_t draw_from_candidates(double draw);

  const Isa& isa_;
  const int n_;
  std::vector<float> weights_;
  std::vector<double> sums_;  // of kBlock weights each
  std::vector<Candidate> candidates_;
};

}  // namespace baton
