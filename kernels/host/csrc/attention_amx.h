// What the two AMX attentions share: for many queries (attention_amx.cpp) and for few (attention_few_amx.cpp). A query
// may come to either, so all that decides its bits is here or is said there to be the same.
#pragma once
#include "vector_avx512.h"

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "kv_pool.h"
#include "tiles_amx.h"

namespace baton {
namespace amx {

constexpr int kFewQueries = 4;
// Of the shapes that fit tiles, and up to kFewQueries queries; in the room that many would need.
void attention_of_few(const AttentionTask& task, uint8_t* scratch);

}  // namespace amx

namespace {

constexpr int kLanes = 16;         // fp32 values of a register; rows of a tile
constexpr int kDepth = 32;         // bf16 values that one tile instruction sums up
constexpr int kChunk = 64;         // keys between two looks at the reference: K and V of more leave the L1 cache
constexpr int kGroups = kChunk / kDepth;
constexpr int kTileBytes = 1024;   // 16 lines
constexpr int kTileDims = 16;      // dims of an output tile
constexpr float kMost = 1024.0f;   // of a chunk's weights; 64 if all are as great as the reference
constexpr int kMaxHeadDim = 256;

// 2^x to 8e-5, which bf16 does not see; x may be -inf.
inline Reg weight_of(Reg x) {
  constexpr int kFloor = 0x09;
  const Reg rest = _mm512_reduce_ps(x, kFloor);  // in [0, 1); 0 for -inf
  Reg power = Vec::set(0.07802452147006989f);
  power = Vec::mul_add(power, rest, Vec::set(0.2260671705007553f));
  power = Vec::mul_add(power, rest, Vec::set(0.6958335041999817f));
  power = Vec::mul_add(power, rest, Vec::set(0.9999251961708069f));
  return _mm512_scalef_ps(power, x);  // floors x
}

// What makes weights powers of two: softmax(q . k / sqrt(head_dim)).
inline float query_scale(int dim) { return kLog2E / std::sqrt(static_cast<float>(dim)); }

// 32 dims of a query.
inline __m512i rounded_query(const float* q, Reg scale) {
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(Vec::mul(Vec::load(q + kLanes), scale), Vec::mul(Vec::load(q), scale)));
}

// int8 to bf16, which is exact.
inline void widen(const int8_t* from, int num, uint16_t* to) {
  for (int i = 0; i < num; i += 2 * kLanes) {
    const __m512 low = Vec::load_int8(from + i), high = Vec::load_int8(from + i + kLanes);
    _mm512_store_si512(to + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
}

}  // namespace
}  // namespace baton
