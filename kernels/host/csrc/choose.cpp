#include "choose.h"

#include <algorithm>
#include <cmath>

namespace baton {
namespace {

constexpr int kBlock = 256, kLanes = 8;
constexpr float kLeastTemperature = 1e-30f;  // below, a difference of 0 over it might not be 0
constexpr float kFall = 1.0f / 64;           // of the bound for candidates
constexpr float kLeastBound = 1e-38f;        // no weight is below

double sum_of(const float* weights, int n) {
  double lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += weights[i + j];
  for (int j = 0; i + j < n; ++j) lanes[j] += weights[i + j];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

}  // namespace

double uniform(uint64_t seed, uint64_t position, uint64_t choice) {
  // numpy steps the counter's first word before it makes a block; so do we, to draw what sampler.py draws.
  uint64_t counter[4] = {1, 0, choice, position}, key[2] = {seed, 0};
  for (int round = 0; round < 10; ++round) {
    const auto low = static_cast<unsigned __int128>(0xD2E7470EE14C6C93) * counter[0];
    const auto high = static_cast<unsigned __int128>(0xCA5A826395121157) * counter[2];
    const uint64_t next[4] = {static_cast<uint64_t>(high >> 64) ^ counter[1] ^ key[0], static_cast<uint64_t>(high),
                              static_cast<uint64_t>(low >> 64) ^ counter[3] ^ key[1], static_cast<uint64_t>(low)};
    std::copy(next, next + 4, counter);
    key[0] += 0x9E3779B97F4A7C15;
    key[1] += 0xBB67AE8584CAA73B;
  }
  return static_cast<double>(counter[0] >> 11) * 0x1p-53;
}

int32_t Chooser::choose(const float* logits, int32_t greatest, const BatonChoice& how) {
  const float most = logits[greatest];
  if (how.temperature == 0 || !std::isfinite(most)) return greatest;
  weights_.resize(n_);
  isa_.weigh(logits, n_, most, std::max(static_cast<float>(how.temperature), kLeastTemperature), weights_.data());
  const double draw = uniform(how.seed, how.position, how.choice);
  const bool filtered = (how.top_k > 0 && how.top_k < n_) || how.top_p < 1 || how.min_p > 0;
  if (!filtered) return draw_from_all(draw);
  collect(how);
  filter(how);
  return draw_from_candidates(draw);
}

double Chooser::sum_all() {
  sums_.clear();
  double total = 0;
  for (int i = 0; i < n_; i += kBlock) {
    sums_.push_back(sum_of(&weights_[i], std::min(kBlock, n_ - i)));
    total += sums_.back();
  }
  return total;
}

// The block first, then the token in it.
int32_t Chooser::draw_from_all(double draw) {
  const double target = draw * sum_all();
  double before = 0;
  size_t block = 0;
  for (; block + 1 < sums_.size() && before + sums_[block] <= target; ++block) before += sums_[block];
  const int begin = static_cast<int>(block) * kBlock, end = std::min(begin + kBlock, n_);
  for (int id = begin; id + 1 < end; ++id)
    if ((before += weights_[id]) > target) return id;
  return end - 1;  // rounding may leave the target just above the last sum
}

// Every token that some filter may keep, and more: those above a bound, which falls until they are enough.
void Chooser::collect(const BatonChoice& how) {
  const double wanted = how.top_k > 0 ? 0 : how.top_p < 1 ? how.top_p * sum_all() : 0;
  for (float bound = kFall;; bound *= kFall) {
    const bool all = bound < kLeastBound;
    candidates_.clear();
    double mass = 0;
    for (int id = 0; id < n_; ++id)
      if (weights_[id] >= bound || all) {
        candidates_.push_back({weights_[id], id});
        mass += weights_[id];
      }
    const bool enough = how.top_k > 0 ? candidates_.size() >= static_cast<size_t>(how.top_k)
                        : how.top_p < 1 ? mass >= wanted : bound <= how.min_p;
    if (enough || all) return;
  }
}

// top_k, then top_p of the mass that leaves, then min_p; then by id again.
void Chooser::filter(const BatonChoice& how) {
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
  });
  if (how.top_k > 0 && candidates_.size() > static_cast<size_t>(how.top_k)) candidates_.resize(how.top_k);
  if (how.top_p < 1) {
    double total = 0, mass = 0;
    if (how.top_k > 0)
      for (const Candidate& one : candidates_) total += one.weight;
    else
      for (const double sum : sums_) total += sum;
    size_t kept = 0;
    while (kept < candidates_.size() && (mass += candidates_[kept++].weight) < how.top_p * total) continue;
    candidates_.resize(kept);
  }
  while (candidates_.back().weight < how.min_p) candidates_.pop_back();  // the first weighs 1
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
}

int32_t Chooser::draw_from_candidates(double draw) {
  double total = 0, sum = 0;
  for (const Candidate& one : candidates_) total += one.weight;
  for (const Candidate& one : candidates_)
    if ((sum += one.weight) > draw * total) return one.id;
  return candidates_.back().id;
}

}  // namespace baton
