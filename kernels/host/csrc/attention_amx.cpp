// Paged attention with AMX tiles, for K and V in bf16 or int8 (whose elements are exact in bf16). fp32, and shapes that
// no tile fits, take AVX-512's.
//
// Sixteen queries (rows x heads of the group) are the sixteen columns of every tile, so that softmax runs down the rows
// with one query per lane:
//
//   scores [keys, 16] = K [keys, dim] x queries [dim, 16]             K lies in the pool as the tile wants it
//   weights [keys, 16] = 2^(scores - tops)                            bf16, pairs of keys side by side
//   out [dim, 16] += V transposed [dim, keys] x weights [keys, 16]    V is transposed once for all queries of a task
//
// Keys go in chunks of kChunk from position 0 on. A lane's reference (tops) moves, and its sums are scaled, only when a
// chunk passes it by kSlack. Nothing crosses lanes, and a lane whose queries see nothing of a chunk, or only its first
// keys, gets weights that are exactly 0 for the rest: its bits are those of a query alone. Slots that nobody has
// written are read as 0 in V and masked in the scores.
//
// The scores of the next sixteen queries are computed between the softmax groups of these, so that nobody waits for the
// last of them. Tiles and vectors share the multipliers: what a step costs is nearly the sum of both (measured).
#include "vector_avx512.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "isa.h"
#include "kv_pool.h"
#include "parts.h"

namespace baton {
namespace {

constexpr int kLanes = 16;         // queries of a tile
constexpr int kDepth = 32;         // bf16 values that one tile instruction sums up
constexpr int kChunk = 64;         // keys between two looks at the reference: K and V of more leave the L1 cache
constexpr int kGroups = kChunk / kDepth;
constexpr int kTileBytes = 1024;   // 16 lines
constexpr int kTileDims = 16;      // dims of an output tile
constexpr int kHeldTiles = 4;      // output tiles held in registers 0-3; 4 and 5 are scores, 6 and 7 operands
constexpr float kSlack = 8.0f;     // powers of two
constexpr int kRowsPerTask = 128;  // enough that transposing V is a small part of the work

using Reg = Vec::Reg;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// What was written before is in memory after: GCC's tile loads do not tell the compiler that they read any.
void settle() { __asm__ volatile("" ::: "memory"); }

// 2^x to 8e-5, which bf16 does not see; x may be -inf.
Reg weight_of(Reg x) {
  constexpr int kFloor = 0x09;
  const Reg rest = _mm512_reduce_ps(x, kFloor);  // in [0, 1); 0 for -inf
  Reg power = Vec::set(0.07802452147006989f);
  power = Vec::mul_add(power, rest, Vec::set(0.2260671705007553f));
  power = Vec::mul_add(power, rest, Vec::set(0.6958335041999817f));
  power = Vec::mul_add(power, rest, Vec::set(0.9999251961708069f));
  return _mm512_scalef_ps(power, x);  // floors x
}

// Rows of two keys as rows of pairs: lane i of the result holds lane i of both.
__m512i pair_up(Reg first, Reg second) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

// Eight dims of 32 tokens, from rows of values to rows of dims: out + i * 64 gets dim i of all tokens.
void transpose_dims(const uint16_t* const* rows, int dim, uint8_t* out) {
  __m512i a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // quarter q holds token 8 q + i
    const auto part = [&](int quarter) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[8 * quarter + i] + dim));
    };
    a[i] = _mm512_castsi128_si512(part(0));
    a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x00f0, part(1));
    a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x0f00, part(2));
    a[i] = _mm512_mask_broadcast_i32x4(a[i], 0xf000, part(3));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_epi16(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi16(a[i], a[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm512_unpacklo_epi32(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi32(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi32(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi32(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    _mm512_store_si512(out + 128 * i, _mm512_unpacklo_epi64(a[i], a[i + 4]));
    _mm512_store_si512(out + 128 * i + 64, _mm512_unpackhi_epi64(a[i], a[i + 4]));
  }
}

// Lanes' state of sixteen queries.
struct alignas(64) Lanes {
  float tops[kLanes], sums[kLanes];
  int32_t positions[kLanes];
  int32_t first, last;  // positions of the first and last lane
};

class Attention {
 public:
  static size_t scratch_bytes(const BatonShape& shape) {
    const size_t queries = static_cast<size_t>(kRowsPerTask) * (shape.num_heads / shape.num_kv_heads);
    const size_t tiles = (queries + kLanes - 1) / kLanes, dim = shape.head_dim;
    const size_t chunk = kChunk * dim * 2;
    return tiles * (sizeof(Lanes) + 3 * dim * kLanes * 2) + 3 * chunk + 2 * dim + 10 * kChunk * kLanes + 8 * kChunk;
  }

  Attention(const AttentionTask& task, uint8_t* scratch)
      : task_(task),
        pool_(task),
        group_(task.shape->num_heads / task.shape->num_kv_heads),
        dim_(task.shape->head_dim),
        num_queries_((task.row_end - task.row_begin) * group_),
        num_tiles_((num_queries_ + kLanes - 1) / kLanes),
        scaled_(task.shape->kv_format == BATON_INT8) {
    const auto take = [&](size_t bytes) { return std::exchange(scratch, scratch + (bytes + 63) / 64 * 64); };
    lanes_ = reinterpret_cast<Lanes*>(take(num_tiles_ * sizeof(Lanes)));
    queries_ = take(static_cast<size_t>(num_tiles_) * query_bytes());
    out_ = take(static_cast<size_t>(num_tiles_) * out_bytes());
    values_ = take(kChunk * dim_ * 2);
    copied_[0] = reinterpret_cast<uint16_t*>(take(kChunk * dim_ * 2));
    copied_[1] = reinterpret_cast<uint16_t*>(take(kChunk * dim_ * 2));
    nothing_ = reinterpret_cast<uint16_t*>(take(dim_ * 2));
    for (float*& scores : scores_) scores = reinterpret_cast<float*>(take(kChunk * kLanes * 4));
    weights_ = take(kChunk * kLanes * 2);
    for (float*& scales : scales_) scales = reinterpret_cast<float*>(take(kChunk * 4));
  }

  void run() {
    static const TileConfig config;
    _tile_loadconfig(&config);
    std::memset(nothing_, 0, dim_ * 2);
    const int first = task_.span->start + task_.row_begin, end = task_.span->start + task_.row_end;
    for (int tile = 0; tile < num_tiles_; ++tile) load_queries(tile, first);
    for (int chunk = 0; chunk < end; chunk += kChunk) {
      pack(chunk, end);
      attend(chunk, std::max(chunk - first, 0) * group_ / kLanes);  // earlier ones see nothing of this chunk
    }
    for (int tile = 0; tile < num_tiles_; ++tile) store_out(tile);
    _tile_release();
  }

 private:
  int query_bytes() const { return dim_ * kLanes * 2; }
  int out_bytes() const { return dim_ * kLanes * 4; }
  uint8_t* queries(int tile) const { return queries_ + static_cast<int64_t>(tile) * query_bytes(); }
  float* out(int tile) const { return reinterpret_cast<float*>(out_ + static_cast<int64_t>(tile) * out_bytes()); }
  // Of query i of the task, in q and in out.
  int64_t row_of(int i) const { return task_.span->row + task_.row_begin + i / group_; }
  int64_t column_of(int i) const { return static_cast<int64_t>(task_.kv_head * group_ + i % group_) * dim_; }

  // [dim / 2][16][2] bf16, scaled so that weights are powers of two: softmax(q . k / sqrt(head_dim)). Lanes behind the
  // last query ask for nothing.
  void load_queries(int tile, int first) {
    const Reg scale = Vec::set(kLog2E / std::sqrt(static_cast<float>(dim_)));
    for (int dim = 0; dim < dim_; dim += kDepth) {
      Reg square[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int i = tile * kLanes + lane;
        square[lane] = Vec::zero();
        if (i >= num_queries_) continue;
        const float* q = task_.q + row_of(i) * task_.q_stride + column_of(i) + dim;
        square[lane] = reinterpret_cast<Reg>(
            _mm512_cvtne2ps_pbh(Vec::mul(Vec::load(q + kLanes), scale), Vec::mul(Vec::load(q), scale)));
      }
      Vec::transpose(square);
      float* to = reinterpret_cast<float*>(queries(tile)) + dim / 2 * kLanes;
      for (int pair = 0; pair < kLanes; ++pair) Vec::store(to + pair * kLanes, square[pair]);
    }
    Lanes& lanes = lanes_[tile];
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes.positions[lane] = first + std::min(tile * kLanes + lane, num_queries_ - 1) / group_;
      lanes.tops[lane] = -INFINITY;
      lanes.sums[lane] = 0.0f;
    }
    lanes.first = lanes.positions[0];
    lanes.last = lanes.positions[kLanes - 1];
    std::memset(out(tile), 0, out_bytes());
  }

  // Keys of a chunk as tiles, and its values transposed; tokens before `end` may be read.
  void pack(int chunk, int end) {
    const int written = std::min(end - chunk, kChunk);
    if (scaled_) std::memset(scales_[1], 0, kChunk * sizeof(float));
    for (int begin = 0; begin < written; begin += kLanes) {
      const int num = std::min(written - begin, kLanes);
      keys_[begin / kLanes] = scaled_ ? copy_rows(chunk + begin, begin, num, 0) : pool_rows(chunk + begin, 0);
    }
    // A group's second half may not exist: its scores are masked whatever they are.
    if ((written + kLanes - 1) / kLanes % 2) keys_[(written + kLanes - 1) / kLanes] = keys_[0];
    for (int begin = 0; begin < written; begin += kDepth) pack_values(chunk, begin, end);
  }

  // Of a group. The tokens one chunk further on are fetched meanwhile, a few lines at a time, because the processor has
  // room for few, and cannot guess where the next block lies.
  void pack_values(int chunk, int begin, int end) {
    const uint16_t* rows[kDepth];
    const uint8_t* ahead[4];  // runs of K and V
    for (int half = 0; half < 2; ++half) {
      const int at = begin + half * kLanes, token = chunk + at, num = std::clamp(end - token, 0, kLanes);
      const uint16_t* from = num == 0 ? nothing_ : scaled_ ? copy_rows(token, at, num, 1) : pool_rows(token, 1);
      for (int i = 0; i < kLanes; ++i) rows[half * kLanes + i] = i < num ? from + i * dim_ : nothing_;
      for (int which = 0; which < 2; ++which)
        ahead[2 * half + which] = pool_.elements(token + kChunk < end ? token + kChunk : chunk, which);
    }
    const int step = 8 * kLanes * pool_.element_bytes();
    for (int dim = 0; dim < dim_; dim += 8) {
      for (const uint8_t*& run : ahead) {
        for (int line = 0; line < step; line += 64) __builtin_prefetch(run + line, 0, 2);
        run += step;
      }
      transpose_dims(rows, dim, values_ + (begin * dim_ + dim * kDepth) * 2);
    }
  }

  const uint16_t* pool_rows(int token, int which) const {
    return reinterpret_cast<const uint16_t*>(pool_.elements(token, which));
  }

  // int8 to bf16, which is exact, and the tokens' scales.
  const uint16_t* copy_rows(int token, int at, int num, int which) {
    uint16_t* to = copied_[which] + at * dim_;
    const int8_t* from = reinterpret_cast<const int8_t*>(pool_.elements(token, which));
    for (int i = 0; i < num * dim_; i += 2 * kLanes) {
      const __m512 low = Vec::load_int8(from + i), high = Vec::load_int8(from + i + kLanes);
      _mm512_store_si512(to + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
    std::memcpy(scales_[which] + at, pool_.scales(token, which), num * sizeof(float));
    return to;
  }

  // How many groups of a chunk's keys a tile of queries sees.
  int groups_seen(int tile, int chunk) const {
    return (std::min(lanes_[tile].last + 1 - chunk, kChunk) + kDepth - 1) / kDepth;
  }

  void attend(int chunk, int first_tile) {
    for (int group = 0; group < groups_seen(first_tile, chunk); ++group) {
      score(first_tile, group);
      store_scores(first_tile, group);
    }
    for (int tile = first_tile; tile < num_tiles_; ++tile) {
      const int groups = groups_seen(tile, chunk);
      const int next_groups = tile + 1 < num_tiles_ ? groups_seen(tile + 1, chunk) : 0;
      const bool masked = lanes_[tile].first + 1 - chunk < groups * kDepth;
      const __m512i seen =
          _mm512_sub_epi32(_mm512_load_si512(lanes_[tile].positions), _mm512_set1_epi32(chunk - 1));
      if (masked || scaled_) finish_scores(tile, groups, seen);
      raise_tops(tile, groups);
      const int held = std::min(dim_ / kTileDims, kHeldTiles);
      load_tiles(tile, 0, held);
      for (int group = 0; group < std::max(groups, next_groups); ++group) {
        if (group < groups) soften(tile, group);
        if (group < next_groups) score(tile + 1, group);
        if (group < groups) mix(group, 0, held);
        if (group < next_groups) store_scores(tile + 1, group);
      }
      store_tiles(tile, 0, held);
      for (int at = held; at < dim_ / kTileDims; at += kHeldTiles) {
        const int num = std::min(dim_ / kTileDims - at, kHeldTiles);
        load_tiles(tile, at, num);
        for (int group = 0; group < groups; ++group) mix(group, at, num);
        store_tiles(tile, at, num);
      }
    }
  }

  // Scores of a group of keys.
  void score(int tile, int group) {
    const uint16_t *low = keys_[2 * group], *high = keys_[2 * group + 1];
    const uint8_t* q = queries(tile);
    settle();
    _tile_zero(4);
    _tile_zero(5);
    for (int dim = 0; dim < dim_; dim += kDepth) {
      _tile_loadd(7, q + dim * kLanes * 2, 64);
      _tile_loadd(6, low + dim, dim_ * 2);
      _tile_dpbf16ps(4, 6, 7);
      _tile_loadd(6, high + dim, dim_ * 2);
      _tile_dpbf16ps(5, 6, 7);
    }
  }

  // Apart from `score`, to be called after the tile loads of other work: they are held up by stores before them.
  void store_scores(int tile, int group) {
    float* scores = scores_[tile % 2] + group * kDepth * kLanes;
    _tile_stored(4, scores, 64);
    _tile_stored(5, scores + kLanes * kLanes, 64);
  }

  // int8: scales the scores. Those of keys that a lane does not see become -inf.
  void finish_scores(int tile, int groups, __m512i seen) {
    for (int key = 0; key < groups * kDepth; ++key) {
      const __mmask16 visible = _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(key));
      float* row = scores_[tile % 2] + key * kLanes;
      const Reg scale = Vec::set(scaled_ ? scales_[0][key] : 1.0f);
      Vec::store(row, _mm512_mask_mul_ps(Vec::set(-INFINITY), visible, Vec::load(row), scale));
    }
  }

  // Lanes that a score passes by kSlack take the chunk's greatest score as reference, and scale what they summed up.
  void raise_tops(int tile, int groups) {
    Lanes& lanes = lanes_[tile];
    const float* scores = scores_[tile % 2];
    Reg most[4] = {Vec::set(-INFINITY), Vec::set(-INFINITY), Vec::set(-INFINITY), Vec::set(-INFINITY)};
    for (int key = 0; key < groups * kDepth; key += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) most[i] = Vec::max(most[i], Vec::load(scores + (key + i) * kLanes));
    const Reg greatest = Vec::max(Vec::max(most[0], most[1]), Vec::max(most[2], most[3]));
    const Reg tops = Vec::load(lanes.tops);
    const __mmask16 passed = _mm512_cmp_ps_mask(greatest, Vec::add(tops, Vec::set(kSlack)), _CMP_GT_OQ);
    if (!passed) return;
    const Reg scale = _mm512_mask_mov_ps(Vec::set(1.0f), passed, weight_of(Vec::sub(tops, greatest)));
    Vec::store(lanes.tops, _mm512_mask_mov_ps(tops, passed, greatest));
    Vec::store(lanes.sums, Vec::mul(Vec::load(lanes.sums), scale));
    for (int dim = 0; dim < dim_; ++dim) {
      float* row = out(tile) + dim * kLanes;
      Vec::store(row, Vec::mul(Vec::load(row), scale));
    }
  }

  // Scores of a group to weights, in pairs of keys.
  void soften(int tile, int group) {
    Lanes& lanes = lanes_[tile];
    const Reg tops = Vec::load(lanes.tops);
    Reg even = Vec::zero(), odd = Vec::zero();
#pragma GCC unroll 4
    for (int key = group * kDepth; key < (group + 1) * kDepth; key += 2) {
      const float* scores = scores_[tile % 2] + key * kLanes;
      Reg first = weight_of(Vec::sub(Vec::load(scores), tops));
      Reg second = weight_of(Vec::sub(Vec::load(scores + kLanes), tops));
      even = Vec::add(even, first);
      odd = Vec::add(odd, second);
      if (scaled_) {
        first = Vec::mul(first, Vec::set(scales_[1][key]));
        second = Vec::mul(second, Vec::set(scales_[1][key + 1]));
      }
      _mm512_store_si512(weights_ + key * kLanes * 2, pair_up(first, second));
    }
    Vec::store(lanes.sums, Vec::add(Vec::load(lanes.sums), Vec::add(even, odd)));
  }

  // Output tiles [at, at + num) of a tile of queries, in registers 0 to num - 1; num is 2 or 4.
  void load_tiles(int tile, int at, int num) const {
    const float* from = out(tile) + at * kTileDims * kLanes;
    settle();
    _tile_loadd(0, from, 64);
    _tile_loadd(1, from + 256, 64);
    if (num == 2) return;
    _tile_loadd(2, from + 512, 64);
    _tile_loadd(3, from + 768, 64);
  }

  void store_tiles(int tile, int at, int num) const {
    float* to = out(tile) + at * kTileDims * kLanes;
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    if (num == 2) return;
    _tile_stored(2, to + 512, 64);
    _tile_stored(3, to + 768, 64);
  }

  void mix(int group, int at, int num) const {
    const uint8_t* values = values_ + group * kDepth * dim_ * 2 + at * kTileBytes;
    settle();
    _tile_loadd(7, weights_ + group * kTileBytes, 64);
    _tile_loadd(6, values, 64);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(6, values + kTileBytes, 64);
    _tile_dpbf16ps(1, 6, 7);
    if (num == 2) return;
    _tile_loadd(6, values + 2 * kTileBytes, 64);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(6, values + 3 * kTileBytes, 64);
    _tile_dpbf16ps(3, 6, 7);
  }

  void store_out(int tile) const {
    alignas(64) float inverse[kLanes];
    Vec::store(inverse, Vec::div(Vec::set(1.0f), Vec::load(lanes_[tile].sums)));
    const int num = std::min(num_queries_ - tile * kLanes, kLanes);
    for (int dim = 0; dim < dim_; dim += kLanes) {
      Reg square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = Vec::load(out(tile) + (dim + i) * kLanes);
      Vec::transpose(square);
      for (int lane = 0; lane < num; ++lane) {
        const int i = tile * kLanes + lane;
        float* to = task_.out + row_of(i) * task_.shape->num_heads * dim_ + column_of(i) + dim;
        Vec::store(to, Vec::mul(square[lane], Vec::set(inverse[lane])));
      }
    }
  }

  const AttentionTask& task_;
  const KvPool pool_;
  const int group_, dim_, num_queries_, num_tiles_;
  const bool scaled_;  // int8: scores and weights are multiplied by the tokens' scales
  Lanes* lanes_;
  uint8_t *queries_, *out_;             // per tile of queries
  uint8_t *values_, *weights_;          // of a chunk: [group][dim][32] and [group][16 pairs][16][2] bf16
  uint16_t *copied_[2], *nothing_;      // K and V of a chunk where they cannot be read in place; a row of zeros
  float *scores_[2], *scales_[2];       // [kChunk][16] of this and the next tile; [kChunk] of K and V
  const uint16_t* keys_[2 * kGroups];   // rows of 16 tokens each
};

bool fits_tiles(const BatonShape& shape) {
  return shape.kv_format != BATON_FP32 && shape.head_dim % kDepth == 0 && shape.block_size % kLanes == 0;
}

}  // namespace

namespace amx {

void attention(const AttentionTask& task, uint8_t* scratch) {
  if (fits_tiles(*task.shape)) return Attention(task, scratch).run();
  for (AttentionTask part = task; part.row_begin < task.row_end; part.row_begin = part.row_end) {
    part.row_end = std::min(part.row_begin + avx512::attention_rows(), task.row_end);
    avx512::attention(part, scratch);
  }
}

size_t attention_scratch_bytes(const BatonShape& shape) {
  return std::max(avx512::attention_scratch_bytes(shape), Attention::scratch_bytes(shape));
}

int attention_rows() { return kRowsPerTask; }

}  // namespace amx
}  // namespace baton
