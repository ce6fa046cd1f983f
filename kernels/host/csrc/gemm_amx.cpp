// Matrix products with AMX: bf16 and int8 in tiles of up to 16 rows by 16 columns, whose sums stay in tile registers
// through all of k. A tile of fewer rows does for each of them what a full one does, so every number of rows goes this
// way, one row too. fp32 takes AVX-512's way.
//
// int4 sums up 32 of k in a tile and then in fp32, as AVX-512 does: the integers are exact, so the two give the same
// bits, and few rows take AVX-512's way, which has no tiles to fill.
//
// Order: panels outside, two at a time; for both all rows, 32 at a time, which had better fit L2. Weights come from
// memory once, and while the rows meet those of two panels, those of the next two are fetched.
#include <cstdlib>

#include "gemm512.h"
#include "parts.h"

namespace baton::amx {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 1024;  // 16 lines of weights

// Tiles 0-3 are sums, 4 and 5 activations, 6 and 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // `depth` bytes of an activation row, at most 64, meet as many of each weight column: a line for every four.
  TileConfig(int num_rows, int depth) {
    for (int tile = 0; tile < 8; ++tile) {
      row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? depth : kLineBytes);
      rows[tile] = static_cast<uint8_t>(tile < 6 ? num_rows : depth / 4);
    }
  }
};

// The intrinsic says that it reads eight bytes; the compiler might leave out the others.
inline void configure(const TileConfig& config) {
  __asm__ volatile("" ::"m"(config));
  _tile_loadconfig(&config);
}

// All rows, in tiles of equal height: the last one moves up and does some rows of the one before it again, since
// another height would cost another configuration.
struct RowTiles {
  int num_rows, count, height;

  explicit RowTiles(int num_rows)
      : num_rows(num_rows),
        count((num_rows + kTileRows - 1) / kTileRows),
        height((num_rows + count - 1) / count) {}
  int begin(int tile) const { return tile + 1 < count ? tile * height : num_rows - height; }
  // Rows of `tile` that the one before it has done.
  int done(int tile) const { return tile * height - begin(tile); }
};

struct Bf16 {
  using Factors = PlainFactors;
  static constexpr int kElementBytes = 2;
  static constexpr bool kInteger = false;
};

struct Int8 {
  using Factors = Int8Factors;
  static constexpr int kElementBytes = 1;
  static constexpr bool kInteger = true;
};

// Tile registers are part of the instruction, so their numbers must be literal.
#define BATON_MULTIPLY(sum, activations, weights) \
  if constexpr (Format::kInteger)                 \
    _tile_dpbsud(sum, activations, weights);      \
  else                                            \
    _tile_dpbf16ps(sum, activations, weights)

template <int kTile>
void store_tile(void* to, int64_t row_bytes) {
  static_assert(kTile < 4, "a sum");
  if constexpr (kTile == 0) _tile_stored(0, to, row_bytes);
  if constexpr (kTile == 1) _tile_stored(1, to, row_bytes);
  if constexpr (kTile == 2) _tile_stored(2, to, row_bytes);
  if constexpr (kTile == 3) _tile_stored(3, to, row_bytes);
}

// Weights that a block fetches while it computes: `lines` of them per step.
template <_mm_hint kCache>
struct Ahead {
  const uint8_t* weights;
  int lines;

  void fetch() {
    for (int i = 0; i < lines; ++i) _mm_prefetch(weights + i * kLineBytes, kCache);
    weights += lines * kLineBytes;
  }
};

// The tiles after those that two panels, read side by side, are at; at their end the first of the next two.
struct NextTiles {
  const uint8_t* weights;
  int64_t panel_bytes;
  const uint8_t* next;
  int64_t left;  // tiles of a panel

  void fetch() {
    weights = --left > 0 ? weights + kTileBytes : next;
    for (int i = 0; i < kTileRows; ++i) {
      _mm_prefetch(weights + i * kLineBytes, _MM_HINT_T0);
      _mm_prefetch(weights + panel_bytes + i * kLineBytes, _MM_HINT_T0);
    }
  }
};

template <typename Format>
struct Product {
  const LinearTask& task;
  const RowTiles rows;
  const int64_t panel_bytes, row_bytes;  // row_bytes: of an activation row
  const int64_t depth;                   // bytes of a row that the product goes through

  explicit Product(const LinearTask& task)
      : task(task),
        rows(task.num_rows),
        panel_bytes(baton::panel_bytes(task.w->format, task.w->k)),
        row_bytes(static_cast<int64_t>(task.x.stride) * Format::kElementBytes),
        depth(static_cast<int64_t>(padded(task.w->k)) * Format::kElementBytes) {}

  const uint8_t* weights(int panel) const { return static_cast<const uint8_t*>(task.w->panels) + panel * panel_bytes; }
  const uint8_t* activations(int tile) const {
    return static_cast<const uint8_t*>(task.x.data) + rows.begin(tile) * row_bytes;
  }

  // Row tile `tile` and kPanels panels; sums in registers 0 and 1.
  template <int kPanels, typename Fetching>
  void one_tile(int tile, int panel, Fetching ahead) const {
    const uint8_t *x = activations(tile), *w = weights(panel);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t i = 0; i < depth; i += kLineBytes, w += kTileBytes) {
      ahead.fetch();
      _tile_loadd(4, x + i, row_bytes);
      _tile_loadd(6, w, kLineBytes);
      BATON_MULTIPLY(0, 4, 6);
      if constexpr (kPanels > 1) {
        _tile_loadd(7, w + panel_bytes, kLineBytes);
        BATON_MULTIPLY(1, 4, 7);
      }
    }
    put_tile<0>(tile, panel);
    if constexpr (kPanels > 1) put_tile<1>(tile, panel + 1);
  }

  // Row tiles `tile` and `tile` + 1 and kPanels panels; sums in registers 0, 1 and 2, 3.
  // Activations pass L1 by, so that it keeps the weights, which all rows meet (36 KB at k = 576; 1.2 times as fast).
  template <int kPanels, _mm_hint kCache>
  void two_tiles(int tile, int panel, Ahead<kCache> ahead) const {
    const uint8_t *x = activations(tile), *below = activations(tile + 1), *w = weights(panel);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < depth; i += kLineBytes, w += kTileBytes) {
      ahead.fetch();
      _tile_stream_loadd(4, x + i, row_bytes);
      _tile_loadd(6, w, kLineBytes);
      _tile_stream_loadd(5, below + i, row_bytes);
      BATON_MULTIPLY(0, 4, 6);
      BATON_MULTIPLY(2, 5, 6);
      if constexpr (kPanels > 1) {
        _tile_loadd(7, w + panel_bytes, kLineBytes);
        BATON_MULTIPLY(1, 4, 7);
        BATON_MULTIPLY(3, 5, 7);
      }
    }
    put_tile<0>(tile, panel);
    put_tile<2>(tile + 1, panel);
    if constexpr (kPanels > 1) {
      put_tile<1>(tile, panel + 1);
      put_tile<3>(tile + 1, panel + 1);
    }
  }

  template <int kSum>
  void put_tile(int tile, int panel) const {
    const Columns columns(task, panel);
    const int begin = rows.begin(tile), height = rows.height;
    if (!Format::kInteger && !columns.accumulate && columns.mask == 0xffff)
      return store_tile<kSum>(columns.at(begin), columns.stride * 4);
    alignas(64) typename Format::Factors::Sum sums[kTileRows];
    store_tile<kSum>(sums, kLineBytes);
    const typename Format::Factors factors(task, weights(panel));
    for (int i = rows.done(tile); i < height; ++i) columns.put(begin + i, factors.product(sums[i], begin + i));
  }

  // Up to 16 rows: what counts is how fast weights come. Two panels side by side, each fetched a tile ahead, come 5 %
  // faster than one after the other, and with 16 rows and a long k 20 %; fetching further ahead changes nothing.
  void few_rows(int begin, int end) const {
    for (; end - begin >= 2; begin += 2)
      one_tile<2>(0, begin, NextTiles{weights(begin), panel_bytes, weights(begin + 2), depth / kLineBytes});
    if (begin < end) one_tile<1>(0, begin, Ahead<_MM_HINT_T0>{weights(begin) + kTileBytes, kTileRows});
  }

  template <int kPanels>
  void many_rows(int begin, int end) const {
    const int num_blocks = (rows.count + 1) / 2, lines = (kPanels * kTileRows + num_blocks - 1) / num_blocks;
    for (; end - begin >= kPanels; begin += kPanels) {
      Ahead<_MM_HINT_T1> ahead{weights(begin + kPanels), lines};
      int tile = 0;
      for (; tile + 1 < rows.count; tile += 2, ahead.weights += lines * depth) two_tiles<kPanels>(tile, begin, ahead);
      if (tile < rows.count) one_tile<kPanels>(tile, begin, ahead);
    }
    if constexpr (kPanels > 1) many_rows<kPanels / 2>(begin, end);
  }

  void run(int begin, int end) const {
    const TileConfig config(rows.height, kLineBytes);
    configure(config);
    if (rows.count == 1)
      few_rows(begin, end);
    else
      many_rows<2>(begin, end);
    _tile_release();
  }
};

constexpr int kInt4TileBytes = kGroup / 4 * kLineBytes;
constexpr int kInt4LeastRows = 2 * kTileRows;  // with fewer, unpacking into memory first costs more than tiles save

// Room for one panel's unpacked weights; each thread keeps the largest it needed.
struct Room {
  uint8_t* bytes = nullptr;
  size_t size = 0;

  ~Room() { std::free(bytes); }
  uint8_t* of(size_t wanted) {
    if (size < wanted) {
      std::free(bytes);
      bytes = static_cast<uint8_t*>(std::aligned_alloc(kLineBytes, wanted));
      size = wanted;
    }
    return bytes;
  }
};
thread_local Room room;

// At least 16 rows, in full tiles: the last one moves up as in RowTiles.
struct Int4Product {
  const LinearTask& task;
  const int num_groups = padded(task.w->k) / kGroup;
  const int64_t stride = task.x.stride, groups_per_row = stride / kGroup;

  const uint8_t* weights(int panel) const {
    return static_cast<const uint8_t*>(task.w->panels) + static_cast<int64_t>(panel) * num_groups * kInt4GroupBytes;
  }

  void unpack(const uint8_t* panel, uint8_t* tiles) const {
    for (int g = 0; g < num_groups; ++g) {
      const Int4Group group(panel + g * kInt4GroupBytes);
      uint8_t* tile = tiles + g * kInt4TileBytes;
      for (int q = 0; q < 8; ++q) _mm512_store_si512(tile + q * kLineBytes, (__m512i)group.quads[q]);
    }
    __asm__ volatile("" ::: "memory");  // the tile loads do not tell the compiler that they read
  }

  void multiply_tile(const uint8_t* tiles, int panel, int row, int done) const {
    const int8_t* x = static_cast<const int8_t*>(task.x.data) + row * stride;
    const float *scales = task.x.scales + row * groups_per_row, *sums = task.x.sums + row * groups_per_row;
    const uint8_t* w = weights(panel);
    alignas(64) __m512i dots[kTileRows];
    __m512 totals[kTileRows] = {};
    for (int g = 0; g < num_groups; ++g, w += kInt4GroupBytes) {
      _tile_zero(0);
      _tile_loadd(4, x + g * kGroup, stride);
      _tile_loadd(6, tiles + g * kInt4TileBytes, kLineBytes);
      _tile_dpbsud(0, 4, 6);
      _tile_stored(0, dots, kLineBytes);
      const Int4Scales factors(w);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r)
        totals[r] = factors.add(totals[r], dots[r], scales[r * groups_per_row + g], sums[r * groups_per_row + g]);
    }
    const Columns columns(task, panel);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
      if (r >= done) columns.put(row + r, totals[r]);
  }

  void run(int begin, int end) const {
    const TileConfig config(kTileRows, kGroup);
    configure(config);
    uint8_t* tiles = room.of(static_cast<size_t>(num_groups) * kInt4TileBytes);
    for (int panel = begin; panel < end; ++panel) {
      unpack(weights(panel), tiles);
      for (int row = 0; row < task.num_rows; row += kTileRows) {
        const int left = task.num_rows - row, done = left < kTileRows ? kTileRows - left : 0;
        multiply_tile(tiles, panel, row - done, done);
      }
    }
    _tile_release();
  }
};

}  // namespace

void linear(const LinearTask& task, int panel_begin, int panel_end) {
  if (task.num_rows == 0) return;
  switch (task.w->format) {
    case BATON_BF16: return Product<Bf16>(task).run(panel_begin, panel_end);
    case BATON_INT8: return Product<Int8>(task).run(panel_begin, panel_end);
    case BATON_INT4:
      if (task.num_rows >= kInt4LeastRows) return Int4Product{task}.run(panel_begin, panel_end);
      [[fallthrough]];
    default: return avx512::linear(task, panel_begin, panel_end);
  }
}

}  // namespace baton::amx
