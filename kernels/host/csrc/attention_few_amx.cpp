// Paged attention of up to four queries with AMX: a row of most models, a draft's rows of some. What a query gets is
// what attention_amx.cpp gives it, bit for bit: the same products are added up in the same order. They are arranged so
// that four lanes are not sixteen, and so that nearly all time goes into waiting for K and V:
//
//   scores [keys, 4] = K [keys, dim] x queries [dim, 4]      four keys to a register
//   weights [4, keys] = 2^(scores - tops)                    bf16
//   out [4, dim] += weights [4, keys] x V [keys, dim]        V in pairs of keys, not transposed
#include "attention_amx.h"

#include <utility>

namespace baton {
namespace {

constexpr int kQueries = amx::kFewQueries;
constexpr int kKeysAtOnce = kLanes / kQueries;  // of a register of scores
constexpr int kAhead = 128;                     // keys between what is fetched and what is read

// Tiles 0 and 1 are of out, 2 and 3 scores, 4 and 5 keys or values, 6 queries, 7 weights.
constexpr TileConfig kTiles{1, 0, {}, {64, 64, 16, 16, 64, 64, 16, 64}, {4, 4, 16, 16, 16, 16, 16, 4}};

// To the greatest of each query in all four places.
Reg greatest_of(Reg x) {
  x = Vec::max(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  return Vec::max(x, _mm512_shuffle_f32x4(x, x, 0x4e));
}

// Sums of even and odd keys' weights, four more keys' in their order.
__m256 add_keys(__m256 sums, Reg weights) {
  return _mm256_add_ps(_mm256_add_ps(sums, _mm512_castps512_ps256(weights)), _mm512_extractf32x8_ps(weights, 1));
}

// Four values, each in the four lanes of its key.
Reg spread(const float* values) {
  const __m512i order = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(order, _mm512_castps128_ps512(_mm_loadu_ps(values)));
}

// Registers of four keys each, 32 keys in all, as four rows of 32 bf16.
void to_rows(const Reg* weights, uint8_t* rows) {
  alignas(64) static constexpr uint16_t kOrder[2][32] = {
      {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60,  //
       1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61},
      {2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62,  //
       3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63}};
  __m512i eight[4];
  for (int i = 0; i < 4; ++i)
    eight[i] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(weights[2 * i + 1], weights[2 * i]));
  for (int i = 0; i < 2; ++i) {
    const __m512i order = _mm512_load_si512(kOrder[i]);
    const __m512i low = _mm512_permutex2var_epi16(eight[0], order, eight[1]);
    const __m512i high = _mm512_permutex2var_epi16(eight[2], order, eight[3]);
    _mm512_store_si512(rows + 128 * i, _mm512_shuffle_i64x2(low, high, 0x44));
    _mm512_store_si512(rows + 128 * i + 64, _mm512_shuffle_i64x2(low, high, 0xee));
  }
}

// 32 dims of two tokens, side by side: 16 dims to each of two lines, a tile apart.
void pair_tokens(const uint16_t* first, const uint16_t* second, uint8_t* out) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i order = _mm512_load_si512(kOrder);
  const __m512i later = _mm512_add_epi16(order, _mm512_set1_epi16(16));
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  _mm512_store_si512(out, _mm512_permutex2var_epi16(a, order, b));
  _mm512_store_si512(out + kTileBytes, _mm512_permutex2var_epi16(a, later, b));
}

// kDim: head_dim, known to the compiler; 0: it is not.
template <int kDim>
class Few {
 public:
  Few(const AttentionTask& task, uint8_t* scratch)
      : task_(task),
        pool_(task),
        next_(task.next ? *task.next : task),
        group_(task.shape->num_heads / task.shape->num_kv_heads),
        given_dim_(task.shape->head_dim),
        num_queries_((task.row_end - task.row_begin) * group_),
        first_(task.span->start + task.row_begin),
        end_(task.span->start + task.row_end),
        next_end_(task.next ? task.next->span->start + task.next->row_end : 0),
        scaled_(task.shape->kv_format == BATON_INT8) {
    const auto take = [&](size_t bytes) { return std::exchange(scratch, scratch + (bytes + 63) / 64 * 64); };
    queries_ = take(dim() * kQueries * 2);
    packed_ = take(kChunk * dim() * 2);
    for (uint16_t*& copied : copied_) copied = reinterpret_cast<uint16_t*>(take(kChunk * dim() * 2));
    nothing_ = reinterpret_cast<uint16_t*>(take(dim() * 2));
    out_ = reinterpret_cast<float*>(take(kQueries * dim() * 4));
    std::memset(nothing_, 0, dim() * 2);
  }

  void run() {
    _tile_loadconfig(&kTiles);
    load_queries();
    for (int chunk = 0; chunk < end_; chunk += kChunk) {
      const int num_groups = (std::min(end_ - chunk, kChunk) + kDepth - 1) / kDepth;
      find(chunk, num_groups);
      for (int i = 0; i < 2 * num_groups; i += 2) {
        score<2>(i);
        score<3>(i + 1);
      }
      for (int i = 0; i < 2 * num_groups; ++i) pack(chunk, i);
      finish_scores(chunk, num_groups * kDepth);
      add_sums(num_groups);
      for (int i = 0; i < dim() / kTileDims; i += 2) {
        mix<0>(i, chunk == 0, num_groups);
        mix<1>(i + 1, chunk == 0, num_groups);
      }
    }
    store_out();
    _tile_release();
  }

 private:
  int dim() const { return kDim ? kDim : given_dim_; }
  int64_t row_of(int i) const { return task_.span->row + task_.row_begin + i / group_; }
  int64_t column_of(int i) const { return static_cast<int64_t>(task_.kv_head * group_ + i % group_) * dim(); }

  // [dim / 2][4][2] bf16; lanes behind the last query ask for nothing.
  void load_queries() {
    const Reg scale = Vec::set(query_scale(dim()));
    const __m512i pairs = _mm512_set_epi32(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    alignas(64) int32_t positions[kLanes];
    for (int lane = 0; lane < kQueries; ++lane) {
      const int i = std::min(lane, num_queries_ - 1);
      const float* q = task_.q + row_of(i) * task_.q_stride + column_of(i);
      for (int at = 0; at < dim(); at += kDepth)
        _mm512_i32scatter_epi32(queries_ + at * kQueries * 2 + lane * 4, pairs,
                                lane < num_queries_ ? rounded_query(q + at, scale) : _mm512_setzero_si512(), 4);
      for (int key = 0; key < kKeysAtOnce; ++key) positions[key * kQueries + lane] = first_ + i / group_ - key;
    }
    positions_ = _mm512_load_si512(positions);
    Vec::store(starts_, Vec::zero());
  }

  // Of the i-th 16 tokens of a chunk, how many exist.
  int written(int chunk, int i) const { return std::clamp(end_ - chunk - i * kLanes, 0, kLanes); }

  // Where keys and values of a chunk lie, as bf16.
  void find(int chunk, int num_groups) {
    for (int i = 0; i < 2 * num_groups; ++i) {
      if (const int num = written(chunk, i)) {
        keys_[i] = tokens(chunk + i * kLanes, i, num, 0);
        values_[i] = tokens(chunk + i * kLanes, i, num, 1);
      } else {  // scores of what does not exist are masked whatever they are
        keys_[i] = keys_[0];
        std::memset(scales_[1] + i * kLanes, 0, kLanes * sizeof(float));
      }
    }
  }

  const uint16_t* tokens(int token, int i, int num, int which) {
    const uint8_t* from = pool_.elements(token, which);
    if (!scaled_) return reinterpret_cast<const uint16_t*>(from);
    uint16_t* to = copied_[which] + i * kLanes * dim();
    widen(reinterpret_cast<const int8_t*>(from), num * dim(), to);
    float* scales = scales_[which] + i * kLanes;
    std::memset(scales, 0, kLanes * sizeof(float));
    std::memcpy(scales, pool_.scales(token, which), num * sizeof(float));
    return to;
  }

  // The elements of 16 tokens from `token` on that are fetched now: of this task or, past its end, of the next.
  const uint8_t* ahead_of(int token, int which) const {
    const int ahead = token + kAhead, whole = (end_ + kLanes - 1) / kLanes * kLanes;
    if (ahead < whole) return pool_.elements(ahead, which);
    return ahead - whole < next_end_ ? next_.elements(ahead - whole, which) : nullptr;
  }

  // Values in pairs: tiles [group][dim / 16] of 16 pairs and 16 dims.
  void pack(int chunk, int i) {
    const int num = written(chunk, i), token = chunk + i * kLanes, bytes = 2 * dim() * pool_.element_bytes();
    const uint8_t* ahead[2] = {num ? ahead_of(token, 0) : nullptr, num ? ahead_of(token, 1) : nullptr};
    uint8_t* to = packed_ + i / 2 * dim() * kDepth * 2 + i % 2 * kTileBytes / 2;
    for (int at = 0; at < kLanes; at += 2, to += 64) {
      for (const uint8_t* lines : ahead)
        for (int line = 0; lines && line < bytes; line += 64) __builtin_prefetch(lines + at / 2 * bytes + line, 0, 2);
      const uint16_t* first = at < num ? values_[i] + at * dim() : nothing_;
      const uint16_t* second = at + 1 < num ? values_[i] + (at + 1) * dim() : nothing_;
      for (int d = 0; d < dim(); d += kDepth) pair_tokens(first + d, second + d, to + d / kTileDims * kTileBytes);
    }
  }

  // Of 16 keys.
  template <int kTile>
  void score(int i) {
    load_tile<kTile>(scaled_ ? static_cast<const void*>(nothing_) : starts_, 0);
    for (int at = 0; at < dim(); at += kDepth) {
      load_tile<6>(queries_ + at * kQueries * 2, kQueries * 4);
      if (at / kDepth % 2 == 0) {
        load_tile<4>(keys_[i] + at, 2 * dim());
        multiply_tiles<kTile, 4, 6>();
      } else {
        load_tile<5>(keys_[i] + at, 2 * dim());
        multiply_tiles<kTile, 5, 6>();
      }
    }
    store_tile<kTile>(scores_ + i * kLanes * kQueries, kQueries * 4);
  }

  // int8: scales the scores. Those of keys that a query does not see become -inf.
  void finish_scores(int chunk, int num_keys) {
    if (scaled_ || first_ + 1 - chunk < num_keys) {
      const __m512i seen = _mm512_sub_epi32(positions_, _mm512_set1_epi32(chunk - 1));
      const Reg start = scaled_ ? Vec::load(starts_) : Vec::zero();
      for (int key = 0; key < num_keys; key += kKeysAtOnce) {
        const __mmask16 visible = _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(key));
        float* scores = scores_ + key * kQueries;
        const Reg score = Vec::mul_add(Vec::load(scores), scaled_ ? spread(scales_[0] + key) : Vec::set(1.0f), start);
        Vec::store(scores, _mm512_mask_mov_ps(Vec::set(-INFINITY), visible, score));
      }
    }
    if (chunk == 0) raise_tops(num_keys, 0xffff);
  }

  // The greatest scores become the reference of lanes `which`; returns what scales the lanes' sums to it.
  Reg raise_tops(int num_keys, __mmask16 which) {
    Reg most = Vec::load(scores_);
    for (int at = kLanes; at < num_keys * kQueries; at += kLanes) most = Vec::max(most, Vec::load(scores_ + at));
    most = _mm512_maskz_mov_ps(which, greatest_of(most));
    for (int at = 0; at < num_keys * kQueries; at += kLanes)
      Vec::store(scores_ + at, Vec::sub(Vec::load(scores_ + at), most));
    Vec::store(starts_, Vec::sub(Vec::load(starts_), most));
    return _mm512_mask_mov_ps(Vec::set(1.0f), which, weight_of(Vec::sub(Vec::zero(), most)));
  }

  // Weights of a chunk, and their sums. Where they are too large, they are made again.
  void add_sums(int num_groups) {
    Reg total = soften(num_groups);
    const __mmask16 passed = _mm512_cmp_ps_mask(total, Vec::set(kMost), _CMP_GT_OQ);
    if (passed) {
      const Reg scale = raise_tops(num_groups * kDepth, passed);
      sums_ = Vec::mul(sums_, scale);
      alignas(64) float scales[kLanes];
      Vec::store(scales, scale);
      for (int i = 0; i < kQueries * dim(); i += kLanes)
        Vec::store(out_ + i, Vec::mul(Vec::load(out_ + i), Vec::set(scales[i / dim()])));
      total = soften(num_groups);
    }
    sums_ = Vec::add(sums_, total);
  }

  Reg soften(int num_groups) {
    __m256 sums = _mm256_setzero_ps();  // of even and odd keys' weights
    for (int group = 0; group < num_groups; ++group) {
      Reg weights[kDepth / kKeysAtOnce];
      for (int i = 0; i < kDepth / kKeysAtOnce; ++i) {
        const int key = group * kDepth + i * kKeysAtOnce;
        weights[i] = weight_of(Vec::load(scores_ + key * kQueries));
        sums = add_keys(sums, weights[i]);
        if (scaled_) weights[i] = Vec::mul(weights[i], spread(scales_[1] + key));
      }
      to_rows(weights, weights_[group]);
    }
    const __m128 total = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    return _mm512_broadcast_f32x4(total);
  }

  // Of 16 dims.
  template <int kTile>
  void mix(int i, bool first, int num_groups) {
    float* out = out_ + i * kTileDims;
    load_tile<kTile>(first ? reinterpret_cast<const float*>(nothing_) : out, first ? 0 : dim() * 4);
    const uint8_t* values = packed_ + i * kTileBytes;
    load_tile<7>(weights_[0], 64);
    load_tile<4>(values, 64);
    multiply_tiles<kTile, 7, 4>();
    if (num_groups > 1) {
      load_tile<7>(weights_[1], 64);
      load_tile<5>(values + dim() * kDepth * 2, 64);
      multiply_tiles<kTile, 7, 5>();
    }
    store_tile<kTile>(out, dim() * 4);
  }

  void store_out() const {
    alignas(64) float inverse[kLanes];
    Vec::store(inverse, Vec::div(Vec::set(1.0f), sums_));
    for (int i = 0; i < num_queries_; ++i) {
      float* to = task_.out + row_of(i) * task_.shape->num_heads * dim() + column_of(i);
      for (int at = 0; at < dim(); at += kLanes)
        Vec::store(to + at, Vec::mul(Vec::load(out_ + i * dim() + at), Vec::set(inverse[i])));
    }
  }

  const AttentionTask& task_;
  const KvPool pool_, next_;
  const int group_, given_dim_, num_queries_;
  const int first_, end_, next_end_;  // positions of the first query, and behind the last; of the next task
  const bool scaled_;                 // int8: scores and weights are multiplied by the tokens' scales
  uint8_t *queries_, *packed_;        // packed: V of a chunk
  uint16_t *copied_[2], *nothing_;    // K and V where they cannot be read in place; a row of zeros
  float* out_;                        // [4][dim]
  const uint16_t *keys_[2 * kGroups], *values_[2 * kGroups];
  __m512i positions_;                 // of the query, less the key's number in its register
  Reg sums_ = Vec::zero();            // of weights
  alignas(64) float starts_[kLanes];  // minus the reference
  alignas(64) float scores_[kChunk * kQueries], scales_[2][kChunk];
  alignas(64) uint8_t weights_[kGroups][kQueries * kDepth * 2];
};

}  // namespace

namespace amx {

void attention_of_few(const AttentionTask& task, uint8_t* scratch) {
  if (task.shape->head_dim == 64) return Few<64>(task, scratch).run();
  if (task.shape->head_dim == 128) return Few<128>(task, scratch).run();
  return Few<0>(task, scratch).run();
}

}  // namespace amx
}  // namespace baton
