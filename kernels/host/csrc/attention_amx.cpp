// Paged attention with AMX tiles, for K and V in bf16 or int8 (whose elements are exact in bf16). fp32, and shapes that
// no tile fits, take AVX-512's. Up to four queries are attention_few_amx.cpp's.
//
// Sixteen queries (rows x heads of the group) are the sixteen columns of every tile, so that softmax runs down the rows
// with one query per lane:
//
//   scores [keys, 16] = K [keys, dim] x queries [dim, 16]             K lies in the pool as the tile wants it
//   weights [keys, 16] = 2^(scores - tops)                            bf16, pairs of keys side by side
//   out [dim, 16] += V transposed [dim, keys] x weights [keys, 16]    V is transposed once for all queries of a task
//
// Keys go in chunks of kChunk from position 0 on. Sums of scores begin at minus the lane's reference, which is the
// greatest score of its first chunk, and moves to that of a later one only if weights there add up to more than kMost.
// Nothing crosses lanes, and a lane whose queries see nothing of a chunk, or only its first keys, gets weights that are
// exactly 0 for the rest: its bits are those of a query alone, as long as K and V are finite (0 times a NaN is none).
// Scores that lie more than 1e5 above all of the first chunk's lose bits to the reference. Slots that nobody has written are read as 0 in V and
// masked in the scores.
//
// What makes it fast (measured on Sapphire Rapids): of three tiles of queries one gets scores, one turns its scores
// into weights and one adds up, a step of each in turn, because a processor that waits for a tile sees only so many
// instructions ahead. A tile is stored two steps after its last product. A load of a tile takes the time of 16 vector
// operations, so the operand that all steps share stays in its register. Zeroing a tile makes it wait for what it held;
// loading one line 16 times does not.
#include "attention_amx.h"

#include <utility>

#include "parts.h"

namespace baton {
namespace {

constexpr int kRowsPerTask = 128;  // enough that transposing V is a small part of the work

// Lanes' state of sixteen queries.
struct alignas(64) Lanes {
  float starts[kLanes], sums[kLanes];  // minus the reference; of weights
  int32_t positions[kLanes];
  int32_t first, last;  // positions of the first and last lane
};

// Tiles to[i] = from[i] + A[i] x B, a step for each i; A[i] and B are `depth` tiles deep. Strides are bytes from one
// row of a tile to the next; steps are bytes from one step, or depth, to the next.
struct Strip {
  int num_steps, depth;
  const uint8_t *from, *b;
  int from_stride, from_step;
  const uint8_t* const* a;
  int a_stride, a_step;
  uint8_t* to;
};

// Of a tile of queries and a chunk: how many of its keys have weights.
struct Softening {
  const float* scores;
  uint8_t* weights;
  int num_keys, done = 0;
  Reg even = Vec::zero(), odd = Vec::zero();  // sums of weights

  Softening(const float* scores, uint8_t* weights, int num_keys)
      : scores(scores), weights(weights), num_keys(num_keys) {}
  Reg total() const { return Vec::add(even, odd); }
};

// kDim: head_dim, known to the compiler; 0: it is not.
template <int kDim>
class Attention {
 public:
  static size_t scratch_bytes(const BatonShape& shape) {
    const size_t queries = static_cast<size_t>(kRowsPerTask) * (shape.num_heads / shape.num_kv_heads);
    const size_t tiles = (queries + kLanes - 1) / kLanes, dim = shape.head_dim;
    const size_t chunk = kChunk * dim * 2;
    return tiles * (sizeof(Lanes) + 3 * dim * kLanes * 2) + 3 * chunk + 2 * dim + 12 * kChunk * kLanes + 8 * kChunk;
  }

  Attention(const AttentionTask& task, uint8_t* scratch)
      : task_(task),
        pool_(task),
        group_(task.shape->num_heads / task.shape->num_kv_heads),
        given_dim_(task.shape->head_dim),
        num_queries_((task.row_end - task.row_begin) * group_),
        num_tiles_((num_queries_ + kLanes - 1) / kLanes),
        scaled_(task.shape->kv_format == BATON_INT8) {
    const auto take = [&](size_t bytes) { return std::exchange(scratch, scratch + (bytes + 63) / 64 * 64); };
    lanes_ = reinterpret_cast<Lanes*>(take(num_tiles_ * sizeof(Lanes)));
    queries_ = take(static_cast<size_t>(num_tiles_) * query_bytes());
    out_ = take(static_cast<size_t>(num_tiles_) * out_bytes());
    packed_ = take(kChunk * dim() * 2);
    for (uint16_t*& copied : copied_) copied = reinterpret_cast<uint16_t*>(take(kChunk * dim() * 2));
    nothing_ = reinterpret_cast<uint16_t*>(take(dim() * 2));
    for (float*& scores : scores_) scores = reinterpret_cast<float*>(take(kChunk * kLanes * 4));
    for (uint8_t*& weights : weights_) weights = take(kChunk * kLanes * 2);
    for (float*& scales : scales_) scales = reinterpret_cast<float*>(take(kChunk * 4));
    for (int i = 0; i < dim() / kTileDims; ++i) values_[i] = packed_ + i * kTileBytes;
  }

  void run() {
    static const TileConfig config;
    _tile_loadconfig(&config);
    std::memset(nothing_, 0, dim() * 2);
    const int first = task_.span->start + task_.row_begin, end = task_.span->start + task_.row_end;
    for (int tile = 0; tile < num_tiles_; ++tile) load_queries(tile, first);
    for (int chunk = 0; chunk < end; chunk += kChunk) {
      const int first_tile = std::max(chunk - first, 0) * group_ / kLanes;  // earlier ones see nothing of this chunk
      look_ahead(chunk + kChunk, end, num_tiles_ - first_tile);
      pack(chunk, end);
      attend(chunk, first_tile);
    }
    for (int tile = 0; tile < num_tiles_; ++tile) store_out(tile);
    _tile_release();
  }

 private:
  int dim() const { return kDim ? kDim : given_dim_; }
  int query_bytes() const { return dim() * kLanes * 2; }
  int out_bytes() const { return dim() * kLanes * 4; }
  uint8_t* queries(int tile) const { return queries_ + static_cast<int64_t>(tile) * query_bytes(); }
  uint8_t* out(int tile) const { return out_ + static_cast<int64_t>(tile) * out_bytes(); }
  float* out_row(int tile, int i) const { return reinterpret_cast<float*>(out(tile)) + i * kLanes; }
  // Of query i of the task, in q and in out.
  int64_t row_of(int i) const { return task_.span->row + task_.row_begin + i / group_; }
  int64_t column_of(int i) const { return static_cast<int64_t>(task_.kv_head * group_ + i % group_) * dim(); }

  // [dim / 2][16][2] bf16, scaled so that weights are powers of two: softmax(q . k / sqrt(head_dim)). Lanes behind the
  // last query ask for nothing.
  void load_queries(int tile, int first) {
    const Reg scale = Vec::set(query_scale(dim()));
    const int num = std::min(num_queries_ - tile * kLanes, kLanes);
    const int64_t rows_ahead = static_cast<int64_t>(kLanes / group_) * task_.q_stride;  // the next tile's, about
    const float* from[kLanes];
    for (int lane = 0; lane < num; ++lane) {
      const int i = tile * kLanes + lane;
      from[lane] = task_.q + row_of(i) * task_.q_stride + column_of(i);
      for (int at = 0; at < dim(); at += kLanes) __builtin_prefetch(from[lane] + rows_ahead + at);
    }
    for (int at = 0; at < dim(); at += kDepth) {
      Reg square[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        square[lane] = Vec::zero();
        if (lane >= num) continue;
        square[lane] = reinterpret_cast<Reg>(rounded_query(from[lane] + at, scale));
      }
      Vec::transpose(square);
      float* to = reinterpret_cast<float*>(queries(tile)) + at / 2 * kLanes;
      for (int pair = 0; pair < kLanes; ++pair) Vec::store(to + pair * kLanes, square[pair]);
    }
    Lanes& lanes = lanes_[tile];
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes.positions[lane] = first + std::min(tile * kLanes + lane, num_queries_ - 1) / group_;
      lanes.starts[lane] = 0.0f;
      lanes.sums[lane] = 0.0f;
    }
    lanes.first = lanes.positions[0];
    lanes.last = lanes.positions[kLanes - 1];
  }

  // Where the tokens of the next chunk lie, which are fetched during this one. The processor cannot guess where the
  // next block is, and has room for few lines at a time: a few are asked for each time that something else was done.
  void look_ahead(int chunk, int end, int num_tiles) {
    const int times = kGroups * dim() / 8 + num_tiles * (2 * kGroups + dim() / kTileDims);
    num_ahead_ = fetched_ = line_ = 0;
    for (int token = chunk; token < std::min(chunk + kChunk, end); token += kLanes)
      for (int which = 0; which < 2; ++which) ahead_[num_ahead_++] = pool_.elements(token, which);
    ahead_bytes_ = kLanes * dim() * pool_.element_bytes();
    lines_at_once_ = (num_ahead_ * ahead_bytes_ / 64 + times - 1) / times;
  }

  void fetch() {
    for (int i = 0; i < lines_at_once_ && fetched_ < num_ahead_; ++i) {
      __builtin_prefetch(ahead_[fetched_] + line_, 0, 2);
      line_ += 64;
      if (line_ == ahead_bytes_) line_ = 0, ++fetched_;
    }
  }

  // Keys of a chunk as tiles, and its values transposed; tokens before `end` may be read.
  void pack(int chunk, int end) {
    const int written = std::min(end - chunk, kChunk);
    if (scaled_) std::memset(scales_[1], 0, kChunk * sizeof(float));
    for (int begin = 0; begin < written; begin += kLanes) {
      const int num = std::min(written - begin, kLanes);
      const uint16_t* keys = scaled_ ? copy_rows(chunk + begin, begin, num, 0) : pool_rows(chunk + begin, 0);
      keys_[begin / kLanes] = reinterpret_cast<const uint8_t*>(keys);
    }
    // A group's second half may not exist: its scores are masked whatever they are.
    if ((written + kLanes - 1) / kLanes % 2) keys_[(written + kLanes - 1) / kLanes] = keys_[0];
    for (int begin = 0; begin < written; begin += kDepth) pack_values(chunk, begin, end);
  }

  void pack_values(int chunk, int begin, int end) {
    const uint16_t* rows[kDepth];
    for (int half = 0; half < 2; ++half) {
      const int at = begin + half * kLanes, token = chunk + at, num = std::clamp(end - token, 0, kLanes);
      const uint16_t* from = num == 0 ? nothing_ : scaled_ ? copy_rows(token, at, num, 1) : pool_rows(token, 1);
      for (int i = 0; i < kLanes; ++i) rows[half * kLanes + i] = i < num ? from + i * dim() : nothing_;
    }
    for (int at = 0; at < dim(); at += 8) {
      fetch();
      transpose_dims(rows, at, packed_ + (begin * dim() + at * kDepth) * 2);
    }
  }

  const uint16_t* pool_rows(int token, int which) const {
    return reinterpret_cast<const uint16_t*>(pool_.elements(token, which));
  }

  const uint16_t* copy_rows(int token, int at, int num, int which) {
    uint16_t* to = copied_[which] + at * dim();
    widen(reinterpret_cast<const int8_t*>(pool_.elements(token, which)), num * dim(), to);
    std::memcpy(scales_[which] + at, pool_.scales(token, which), num * sizeof(float));
    return to;
  }

  // How many groups of a chunk's keys a tile of queries sees.
  int groups_seen(int tile, int chunk) const {
    return (std::min(lanes_[tile].last + 1 - chunk, kChunk) + kDepth - 1) / kDepth;
  }

  void attend(int chunk, int first_tile) {
    for (int tile = first_tile - 1; tile <= num_tiles_; ++tile) {
      const Strip to_score = tile + 1 < num_tiles_ ? scores_of(tile + 1, chunk) : Strip{};
      const Strip to_mix = tile > first_tile ? sums_of(tile - 1, chunk) : Strip{};
      const bool softens = tile >= first_tile && tile < num_tiles_;
      if (softens) finish_scores(tile, chunk);
      Softening softening{scores_[tile & 1], weights_[tile & 1], softens ? groups_seen(tile, chunk) * kDepth : 0};
      if (kDim && to_score.num_steps == 2 * kGroups)
        run_strip(to_score, 2 * kGroups, kDim / kDepth, softening, kChunk / 2);
      else
        run_strip(to_score, to_score.num_steps, to_score.depth, softening, kChunk / 2);
      if (kDim && to_mix.depth == kGroups)
        run_strip(to_mix, kDim / kTileDims, kGroups, softening, kChunk);
      else
        run_strip(to_mix, to_mix.num_steps, to_mix.depth, softening, kChunk);
      soften(softening, kChunk);
      if (!to_score.num_steps || !to_mix.num_steps) store_late();
      if (softens) add_sums(tile, softening);
    }
  }

  Strip scores_of(int tile, int chunk) const {
    const void* from = scaled_ ? static_cast<const void*>(nothing_) : lanes_[tile].starts;
    return {2 * groups_seen(tile, chunk), dim() / kDepth,
            static_cast<const uint8_t*>(from), queries(tile), 0, 0,
            keys_, 2 * dim(), 2 * kDepth,
            reinterpret_cast<uint8_t*>(scores_[tile & 1])};
  }

  Strip sums_of(int tile, int chunk) const {
    const bool none = chunk == 0;
    return {dim() / kTileDims, groups_seen(tile, chunk),
            none ? reinterpret_cast<const uint8_t*>(nothing_) : out(tile), weights_[tile & 1],
            none ? 0 : 64, none ? 0 : kTileBytes,
            values_, 64, kDepth * dim() * 2,
            out(tile)};
  }

  // Steps of the tiles in turn with those of the softening, which gets from half a chunk before `num_keys` to there.
  // num_steps and depth are the strip's; where they are constants, nothing is decided as it runs.
  BATON_INLINE void run_strip(const Strip& strip, int num_steps, int depth, Softening& softening, int num_keys) {
    constexpr int kHalf = kChunk / 2;
    if (late_[0]) store_late();
#pragma GCC unroll 8
    for (int step = 0; step < num_steps; ++step) {
      switch (step % 4) {
        case 0: run_step<0>(strip, step, depth); break;
        case 1: run_step<1>(strip, step, depth); break;
        case 2: run_step<2>(strip, step, depth); break;
        default: run_step<3>(strip, step, depth);
      }
      fetch();
      soften(softening, num_keys - kHalf + kHalf * (step + 1) / num_steps);
    }
  }

  // What the operands of two depths share is loaded once if there are no more than those.
  template <int kSums>
  BATON_INLINE void run_step(const Strip& strip, int step, int num_depths) {
    constexpr int kOther = (kSums + 2) % 4;
    load_tile<kSums>(strip.from + step * strip.from_step, strip.from_stride);
    for (int depth = 0; depth < num_depths; depth += 2) {
      const uint8_t *a = strip.a[step] + depth * strip.a_step, *b = strip.b + depth * kTileBytes;
      if (step == 0 || num_depths > 2) load_tile<6>(b, 64);
      load_tile<4>(a, strip.a_stride);
      multiply_tiles<kSums, 4, 6>();
      if (depth + 1 == num_depths) break;
      if (step == 0 || num_depths > 2) load_tile<7>(b + kTileBytes, 64);
      load_tile<5>(a + strip.a_step, strip.a_stride);
      multiply_tiles<kSums, 5, 7>();
    }
    if (late_[kOther]) store_tile<kOther>(late_[kOther]);
    late_[kOther] = nullptr;
    late_[kSums] = strip.to + step * kTileBytes;
  }

  void store_late() {
    if (late_[0]) store_tile<0>(late_[0]);
    if (late_[1]) store_tile<1>(late_[1]);
    if (late_[2]) store_tile<2>(late_[2]);
    if (late_[3]) store_tile<3>(late_[3]);
    for (uint8_t*& late : late_) late = nullptr;
  }

  // int8: scales the scores. Those of keys that a lane does not see become -inf.
  void finish_scores(int tile, int chunk) {
    Lanes& lanes = lanes_[tile];
    float* scores = scores_[tile & 1];
    const int num_keys = groups_seen(tile, chunk) * kDepth;
    if (scaled_ || lanes.first + 1 - chunk < num_keys) {
      const __m512i seen = _mm512_sub_epi32(_mm512_load_si512(lanes.positions), _mm512_set1_epi32(chunk - 1));
      const Reg start = scaled_ ? Vec::load(lanes.starts) : Vec::zero();
      for (int key = 0; key < num_keys; ++key) {
        const __mmask16 visible = _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(key));
        float* row = scores + key * kLanes;
        const Reg score = Vec::mul_add(Vec::load(row), Vec::set(scaled_ ? scales_[0][key] : 1.0f), start);
        Vec::store(row, _mm512_mask_mov_ps(Vec::set(-INFINITY), visible, score));
      }
    }
    if (chunk == 0) raise_tops(lanes, scores, num_keys, 0xffff);
  }

  // The greatest scores become the reference of lanes `which`; returns what scales the lanes' sums to it.
  static Reg raise_tops(Lanes& lanes, float* scores, int num_keys, __mmask16 which) {
    Reg most = Vec::load(scores);
    for (int key = 1; key < num_keys; ++key) most = Vec::max(most, Vec::load(scores + key * kLanes));
    most = _mm512_maskz_mov_ps(which, most);
    for (int key = 0; key < num_keys; ++key)
      Vec::store(scores + key * kLanes, Vec::sub(Vec::load(scores + key * kLanes), most));
    Vec::store(lanes.starts, Vec::sub(Vec::load(lanes.starts), most));
    return _mm512_mask_mov_ps(Vec::set(1.0f), which, weight_of(Vec::sub(Vec::zero(), most)));
  }

  // Of a chunk that is softened. Where its weights are too large, they are made again.
  void add_sums(int tile, Softening& softening) {
    Lanes& lanes = lanes_[tile];
    Reg sums = Vec::load(lanes.sums);
    const __mmask16 passed = _mm512_cmp_ps_mask(softening.total(), Vec::set(kMost), _CMP_GT_OQ);
    if (passed) {
      const Reg scale = raise_tops(lanes, scores_[tile & 1], softening.num_keys, passed);
      sums = Vec::mul(sums, scale);
      for (int i = 0; i < dim(); ++i) Vec::store(out_row(tile, i), Vec::mul(Vec::load(out_row(tile, i)), scale));
      softening.done = 0;
      softening.even = softening.odd = Vec::zero();
      soften(softening, kChunk);
    }
    Vec::store(lanes.sums, Vec::add(sums, softening.total()));
  }

  // Scores of keys up to `end` to weights, eight at a time, in pairs of keys.
  BATON_INLINE void soften(Softening& softening, int end) const {
    constexpr int kAtOnce = 8;
    end = std::min(end / kAtOnce * kAtOnce, softening.num_keys);
    Reg even = softening.even, odd = softening.odd;
    for (; softening.done < end; softening.done += kAtOnce) {
#pragma GCC unroll 4
      for (int key = softening.done; key < softening.done + kAtOnce; key += 2) {
        const float* scores = softening.scores + key * kLanes;
        Reg first = weight_of(Vec::load(scores)), second = weight_of(Vec::load(scores + kLanes));
        even = Vec::add(even, first);
        odd = Vec::add(odd, second);
        if (scaled_) {
          first = Vec::mul(first, Vec::set(scales_[1][key]));
          second = Vec::mul(second, Vec::set(scales_[1][key + 1]));
        }
        _mm512_store_si512(softening.weights + key * kLanes * 2, pair_up(first, second));
      }
    }
    softening.even = even;
    softening.odd = odd;
  }

  void store_out(int tile) const {
    alignas(64) float inverse[kLanes];
    Vec::store(inverse, Vec::div(Vec::set(1.0f), Vec::load(lanes_[tile].sums)));
    const int num = std::min(num_queries_ - tile * kLanes, kLanes);
    const int64_t row = task_.shape->num_heads * dim(), rows_ahead = kLanes / group_ * row;
    float* to[kLanes];
    for (int lane = 0; lane < num; ++lane) {
      const int i = tile * kLanes + lane;
      to[lane] = task_.out + row_of(i) * row + column_of(i);
      for (int at = 0; at < dim(); at += kLanes) __builtin_prefetch(to[lane] + rows_ahead + at, 1);
    }
    for (int at = 0; at < dim(); at += kLanes) {
      Reg square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = Vec::load(out_row(tile, at + i));
      Vec::transpose(square);
      for (int lane = 0; lane < num; ++lane)
        Vec::store(to[lane] + at, Vec::mul(square[lane], Vec::set(inverse[lane])));
    }
  }

  const AttentionTask& task_;
  const KvPool pool_;
  const int group_, given_dim_, num_queries_, num_tiles_;
  const bool scaled_;  // int8: scores and weights are multiplied by the tokens' scales
  Lanes* lanes_;
  uint8_t *queries_, *out_;                           // per tile of queries
  uint8_t* packed_;                                   // V of a chunk: [group][dim][32] bf16
  uint16_t *copied_[2], *nothing_;                    // K and V where they cannot be read in place; a row of zeros
  float *scores_[2], *scales_[2];                     // [kChunk][16] of this and the next tile; [kChunk] of K and V
  uint8_t* weights_[2];                               // [group][16 pairs][16][2] bf16 of this and the last tile
  const uint8_t* keys_[2 * kGroups];                  // tiles of 16 tokens each
  const uint8_t* values_[kMaxHeadDim / kTileDims];    // tiles of 16 dims each
  uint8_t* late_[4] = {};                             // where registers 0 to 3 are still to be stored
  const uint8_t* ahead_[4 * kGroups];                 // 16 tokens each of the next chunk's K and V
  int num_ahead_, ahead_bytes_, lines_at_once_, fetched_, line_;
};

// A tile of few lanes is no faster than a full one, so few queries are arranged in another way.
bool are_few(const AttentionTask& task) {
  return (task.row_end - task.row_begin) * (task.shape->num_heads / task.shape->num_kv_heads) <= amx::kFewQueries;
}

bool fits_tiles(const BatonShape& shape) {
  return shape.kv_format != BATON_FP32 && shape.head_dim % kDepth == 0 && shape.block_size % kLanes == 0;
}

}  // namespace

namespace amx {

void attention(const AttentionTask& task, uint8_t* scratch) {
  if (fits_tiles(*task.shape)) {
    if (are_few(task)) return attention_of_few(task, scratch);
    if (task.shape->head_dim == 64) return Attention<64>(task, scratch).run();
    if (task.shape->head_dim == 128) return Attention<128>(task, scratch).run();
    return Attention<0>(task, scratch).run();
  }
  for (AttentionTask part = task; part.row_begin < task.row_end; part.row_begin = part.row_end) {
    part.row_end = std::min(part.row_begin + avx512::attention_rows(), task.row_end);
    avx512::attention(part, scratch);
  }
}

size_t attention_scratch_bytes(const BatonShape& shape) {
  return std::max(avx512::attention_scratch_bytes(shape), Attention<0>::scratch_bytes(shape));
}

int attention_rows() { return kRowsPerTask; }

}  // namespace amx
}  // namespace baton
