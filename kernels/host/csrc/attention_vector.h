// Paged attention of an instruction set, over its `Vec` (include one of vector_*.h first).
//
// A task's queries (rows x heads of the group) go over keys in tiles of kKeyTile, from position 0 on. The tile's keys
// are transposed once for all queries of the task; then each query has its own scores, softmax and sum, in the same
// order whatever other queries there are:
//
//   scores[32] = q . keys         lanes are keys, one pass over dim
//   weights = 2^(scores - top)    top, the reference of the query, moves only when a score passes it by kSlack, so
//                                 that the sum is rarely scaled again; weights stay below 2^kSlack
//   out[dim] += weights . values  lanes are dims, one pass over the 32 keys
//
// A query skips tiles that it does not see. Of its last tile it sees the first keys; the others weigh exactly 0, and
// slots that nobody has written are read as 0, so that rubbish in them (NaN) cannot reach it.
//
// `Arithmetic` says what a 32-bit lane is: one fp32 value, or a pair of bf16 values that one instruction multiplies and
// adds. It is Whole or, where the instruction set has it, Pairs (attention_avx512.cpp).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "isa.h"
#include "kv_pool.h"

namespace baton {
namespace {

using Reg = Vec::Reg;

constexpr float kSlack = 8.0f;    // powers of two
constexpr int kRowsPerTask = 64;  // enough that packing a key tile is a small part of the work
constexpr int kTileRegs = kKeyTile / Vec::kWidth;
constexpr int kQueries = Vec::kWidth == 16 ? 6 : Vec::kWidth == 8 ? 3 : 1;  // at once: as registers allow
constexpr int kDimRegs = 4;                                                  // of a query's output at once
constexpr int kMaxHeadDim = 256;
constexpr int kDimStep = 16;                                                 // dims are padded to a multiple of it

// 2^x; x may be -inf.
Reg pow2_of(Reg x) {
  x = Vec::max(Vec::set(-200.0f), x);
  const Reg whole = Vec::round(x), rest = Vec::sub(x, whole);
  Reg power = Vec::set(kPow2[6]);
#pragma GCC unroll 6
  for (int i = 5; i >= 0; --i) power = Vec::mul_add(power, rest, Vec::set(kPow2[i]));
  return Vec::scale(power, whole);
}

// A lane is an fp32 value; K and V are turned into that as they are read.
struct Whole {
  using Element = float;
  static constexpr int kPerLane = 1;
  static constexpr int kNative = BATON_FP32;  // the pool format whose rows need no conversion
  static constexpr bool kScalesLate = false;  // int8: elements are multiplied by their scale as they are read

  static Reg mul_add(Reg a, Reg b, Reg c) { return Vec::mul_add(a, b, c); }
  static void store(float* out, Reg x) { Vec::store(out, x); }
  static void store_weights(float* out, const Reg (&weights)[kTileRegs]) {
    for (int r = 0; r < kTileRegs; ++r) Vec::store(out + r * Vec::kWidth, weights[r]);
  }
  static void convert(const uint8_t* row, int format, float scale, int dim, float* out) {
    const Reg scales = Vec::set(scale);
    for (int i = 0; i < dim; i += Vec::kWidth) {
      Vec::store(out + i, format == BATON_BF16
                              ? Vec::load_bf16(reinterpret_cast<const uint16_t*>(row) + i)
                              : Vec::mul(Vec::load_int8(reinterpret_cast<const int8_t*>(row) + i), scales));
    }
  }
  static const float* join(const float* const* rows, int, float*) { return rows[0]; }
};

template <typename Arithmetic>
class Attention {
  using Element = typename Arithmetic::Element;
  static constexpr int kPerLane = Arithmetic::kPerLane;
  static constexpr int kWeightLanes = kKeyTile / kPerLane;

 public:
  static size_t scratch_bytes(const BatonShape& shape) {
    const size_t queries = static_cast<size_t>(kRowsPerTask) * (shape.num_heads / shape.num_kv_heads);
    const size_t dim = padded_dim(shape.head_dim);
    return 4 * (queries * (2 * dim + Vec::kWidth + 1) + (3 * dim + kQueries + 2) * kKeyTile + 256);
  }

  Attention(const AttentionTask& task, uint8_t* scratch)
      : task_(task),
        pool_(task),
        group_(task.shape->num_heads / task.shape->num_kv_heads),
        dim_(padded_dim(task.shape->head_dim)),
        steps_(dim_ / kPerLane),
        num_queries_((task.row_end - task.row_begin) * group_),
        late_scales_(Arithmetic::kScalesLate && task.shape->kv_format == BATON_INT8) {
    float* next = reinterpret_cast<float*>(scratch);
    const auto take = [&](size_t count) { return std::exchange(next, next + (count + 15) / 16 * 16); };
    queries_ = take(static_cast<size_t>(num_queries_) * steps_);
    out_ = take(static_cast<size_t>(num_queries_) * dim_);
    sums_ = take(static_cast<size_t>(num_queries_) * Vec::kWidth);
    tops_ = take(num_queries_);
    copied_ = reinterpret_cast<Element*>(take(kKeyTile * dim_));
    keys_ = take(kKeyTile * dim_);
    joined_ = take(kKeyTile * dim_);
    weights_ = take(kQueries * kKeyTile);
    key_scales_ = take(kKeyTile);
    value_scales_ = take(kKeyTile);
  }

  void run() {
    load_queries();
    const int first = task_.span->start + task_.row_begin, end = task_.span->start + task_.row_end;
    for (int tile = 0; tile < end; tile += kKeyTile) {
      pack(tile, end - tile);
      int query = std::max(tile - first, 0) * group_;  // earlier ones see nothing of this tile
      while (query < num_queries_) query += attend_up_to<kQueries>(first - tile, query);
    }
    store_out();
  }

 private:
  static int padded_dim(int head_dim) { return (head_dim + kDimStep - 1) / kDimStep * kDimStep; }

  static Reg load_within(const float* x, int at, int end) {
    if (at + Vec::kWidth <= end) return Vec::load(x + at);
    return at < end ? Vec::load_first(x + at, end - at) : Vec::zero();
  }

  // Of query i of the task, in q and in out.
  int64_t row_of(int i) const { return task_.span->row + task_.row_begin + i / group_; }
  int64_t column_of(int i) const { return static_cast<int64_t>(task_.kv_head * group_ + i % group_) * pool_.head_dim; }

  // Scaled so that weights are powers of two: softmax(q . k / sqrt(head_dim)).
  void load_queries() {
    const Reg scale = Vec::set(kLog2E / std::sqrt(static_cast<float>(pool_.head_dim)));
    for (int i = 0; i < num_queries_; ++i) {
      const float* q = task_.q + row_of(i) * task_.q_stride + column_of(i);
      Element* out = reinterpret_cast<Element*>(queries_ + static_cast<int64_t>(i) * steps_);
      for (int at = 0; at < dim_; at += Vec::kWidth)
        Arithmetic::store(out + at, Vec::mul(load_within(q, at, pool_.head_dim), scale));
      tops_[i] = -INFINITY;
    }
    std::memset(out_, 0, static_cast<size_t>(num_queries_) * dim_ * sizeof(float));
    std::memset(sums_, 0, static_cast<size_t>(num_queries_) * Vec::kWidth * sizeof(float));
  }

  // Keys [dim lanes][32] and rows of values of a tile, of which `written` tokens may be read.
  void pack(int tile, int written) {
    const Element* rows[kKeyTile];
    read_rows(tile, written, 0, key_scales_, rows);
    for (int token = 0; token < kKeyTile; token += Vec::kWidth)
      for (int step = 0; step < steps_; step += Vec::kWidth) transpose(rows + token, step, keys_ + token);
    read_rows(tile, written, 1, value_scales_, rows);
    for (int i = 0; i < kWeightLanes; ++i)
      values_[i] = Arithmetic::join(rows + i * kPerLane, dim_, joined_ + i * dim_);
  }

  void transpose(const Element* const* rows, int step, float* out) const {
    Reg square[Vec::kWidth];
    for (int i = 0; i < Vec::kWidth; ++i)
      square[i] = load_within(reinterpret_cast<const float*>(rows[i]), step, steps_);
    Vec::transpose(square);
    for (int i = 0; i < std::min(steps_ - step, Vec::kWidth); ++i) Vec::store(out + (step + i) * kKeyTile, square[i]);
  }

  // Rows of K or V: in the pool itself where that is possible, else copied. Those of the next tile are fetched
  // meanwhile, since the processor cannot guess where the next block lies.
  void read_rows(int tile, int written, int which, float* scales, const Element** rows) {
    const uint8_t *row = nullptr, *ahead = nullptr;
    const float* scale = nullptr;
    const int row_bytes = pool_.head_dim * pool_.element_bytes();
    for (int i = 0, left = 0; i < kKeyTile; ++i, --left, row += row_bytes, ++scale) {
      Element* copy = copied_ + i * dim_;
      rows[i] = copy;
      scales[i] = 0.0f;
      if (i >= written) {
        std::memset(static_cast<void*>(copy), 0, dim_ * sizeof *copy);
        continue;
      }
      if (left == 0) {  // the next block
        left = pool_.block_size - (tile + i) % pool_.block_size;
        row = pool_.elements(tile + i, which);
        scale = pool_.scales(tile + i, which);
        ahead = i + kKeyTile < written ? pool_.elements(tile + i + kKeyTile, which) : row;
      }
      for (int line = 0; line < row_bytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
      ahead += row_bytes;
      if (pool_.format == BATON_INT8) scales[i] = *scale;
      if (pool_.format == Arithmetic::kNative && dim_ == pool_.head_dim)
        rows[i] = reinterpret_cast<const Element*>(row);
      else
        copy_row(row, row_bytes, scales[i], copy);
    }
  }

  void copy_row(const uint8_t* row, int row_bytes, float scale, Element* copy) const {
    alignas(64) uint8_t wide[4 * kMaxHeadDim];
    if (dim_ != pool_.head_dim) {
      std::memset(wide, 0, sizeof wide);
      row = static_cast<const uint8_t*>(std::memcpy(wide, row, row_bytes));
    }
    if (pool_.format == Arithmetic::kNative)
      std::memcpy(copy, row, dim_ * sizeof *copy);
    else
      Arithmetic::convert(row, pool_.format, scale, dim_, copy);
  }

  // As many queries at once as there are, at most N; returns how many.
  template <int N>
  int attend_up_to(int distance, int query) {
    if constexpr (N > 1) {
      if (num_queries_ - query < N) return attend_up_to<N - 1>(distance, query);
    }
    attend<N>(distance, query);
    return N;
  }

  // `distance`: from the tile's first key to the task's first row, in tokens.
  template <int N>
  void attend(int distance, int query) {
    Reg scores[N][kTileRegs];
    score<N>(query, scores);
    for (int i = 0; i < N; ++i) {
      const int seen = distance + (query + i) / group_ + 1;
      soften(query + i, seen, scores[i], weights_ + i * kKeyTile);
    }
    int dim = 0;
    for (; dim + kDimRegs * Vec::kWidth <= dim_; dim += kDimRegs * Vec::kWidth) mix<N, kDimRegs>(query, dim);
    for (; dim < dim_; dim += kDimStep) mix<N, kDimStep / Vec::kWidth>(query, dim);
  }

  template <int N>
  void score(int query, Reg (&scores)[N][kTileRegs]) const {
    const float* q = queries_ + static_cast<int64_t>(query) * steps_;
    for (int i = 0; i < N; ++i)
      for (int r = 0; r < kTileRegs; ++r) scores[i][r] = Vec::zero();
    for (int step = 0; step < steps_; ++step) {
      Reg keys[kTileRegs];
#pragma GCC unroll 8
      for (int r = 0; r < kTileRegs; ++r) keys[r] = Vec::load(keys_ + step * kKeyTile + r * Vec::kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const Reg lane = Vec::set(q[i * steps_ + step]);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRegs; ++r) scores[i][r] = Arithmetic::mul_add(lane, keys[r], scores[i][r]);
      }
    }
  }

  // Scores to weights, of which the first `seen` count.
  void soften(int query, int seen, Reg (&scores)[kTileRegs], float* weights) {
    Reg top = Vec::set(tops_[query]);
    bool passed = false;
    for (int r = 0; r < kTileRegs; ++r) {
      if (late_scales_) scores[r] = Vec::mul(scores[r], Vec::load(key_scales_ + r * Vec::kWidth));
      scores[r] = Vec::keep_first(scores[r], seen - r * Vec::kWidth, -INFINITY);
      passed |= Vec::any_above(scores[r], Vec::add(top, Vec::set(kSlack)));
    }
    if (passed) top = Vec::set(raise_top(query, scores));
    float* sum = sums_ + query * Vec::kWidth;
    Reg total = Vec::load(sum);
    for (int r = 0; r < kTileRegs; ++r) {
      scores[r] = pow2_of(Vec::sub(scores[r], top));
      total = Vec::add(total, scores[r]);
      if (late_scales_) scores[r] = Vec::mul(scores[r], Vec::load(value_scales_ + r * Vec::kWidth));
    }
    Vec::store(sum, total);
    Arithmetic::store_weights(weights, scores);
  }

  // The tile's greatest score becomes the query's reference; what was summed up is scaled to it.
  float raise_top(int query, const Reg (&scores)[kTileRegs]) {
    Reg greatest = scores[0];
    for (int r = 1; r < kTileRegs; ++r) greatest = Vec::max(greatest, scores[r]);
    const float top = Vec::greatest(greatest);
    const Reg scale = pow2_of(Vec::set(tops_[query] - top));
    float* out = out_ + static_cast<int64_t>(query) * dim_;
    for (int i = 0; i < dim_; i += Vec::kWidth) Vec::store(out + i, Vec::mul(Vec::load(out + i), scale));
    float* sum = sums_ + query * Vec::kWidth;
    Vec::store(sum, Vec::mul(Vec::load(sum), scale));
    tops_[query] = top;
    return top;
  }

  // out += weights . values for R registers of dims.
  template <int N, int R>
  void mix(int query, int dim) {
    float* out = out_ + static_cast<int64_t>(query) * dim_ + dim;
    Reg sums[N][R];
    for (int i = 0; i < N; ++i)
      for (int r = 0; r < R; ++r) sums[i][r] = Vec::load(out + i * dim_ + r * Vec::kWidth);
    for (int key = 0; key < kWeightLanes; ++key) {
      const float* value = values_[key] + dim;
      Reg values[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) values[r] = Vec::load(value + r * Vec::kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const Reg weight = Vec::set(weights_[i * kKeyTile + key]);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[i][r] = Arithmetic::mul_add(weight, values[r], sums[i][r]);
      }
    }
    for (int i = 0; i < N; ++i)
      for (int r = 0; r < R; ++r) Vec::store(out + i * dim_ + r * Vec::kWidth, sums[i][r]);
  }

  void store_out() const {
    const int head_dim = pool_.head_dim;
    for (int i = 0; i < num_queries_; ++i) {
      const Reg inverse = Vec::set(1.0f / Vec::sum(Vec::load(sums_ + i * Vec::kWidth)));
      const float* from = out_ + static_cast<int64_t>(i) * dim_;
      float* out = task_.out + row_of(i) * task_.shape->num_heads * head_dim + column_of(i);
      for (int at = 0; at < head_dim; at += Vec::kWidth) {
        const Reg mean = Vec::mul(Vec::load(from + at), inverse);
        if (at + Vec::kWidth <= head_dim)
          Vec::store(out + at, mean);
        else
          Vec::store_first(out + at, mean, head_dim - at);
      }
    }
  }

  const AttentionTask& task_;
  const KvPool pool_;
  const int group_, dim_, steps_;  // steps: 32-bit lanes of a row
  const int num_queries_;
  const bool late_scales_;  // int8: scores and weights are scaled, not elements
  float *queries_, *out_, *sums_, *tops_;
  Element* copied_;
  float *keys_, *joined_, *weights_, *key_scales_, *value_scales_;
  const float* values_[kWeightLanes];
};

}  // namespace
}  // namespace baton
