// A program: an op list checked and laid out for execution, with the buffers of one step.
//
// Producers of x (norm, SwiGLU, attention) are not executed where they stand: the linear op that reads x remembers its
// source, and makes activations from it when it runs. With few rows every thread makes them for itself, which costs
// less than a barrier between the two.
#pragma once
#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "isa.h"

namespace baton {

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], FreeMemory>;

constexpr size_t kHugePage = 2 << 20;

// 64-byte aligned and not initialised. Large ones ask for huge pages: rows of a step lie kilobytes apart, and the step
// of a prompt is 2 to 10 % faster when they need few entries of the TLB.
template <typename T>
Buffer<T> make_buffer(size_t count) {
  const size_t bytes = count * sizeof(T), alignment = bytes >= kHugePage ? kHugePage : 64;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
#if defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return Buffer<T>(static_cast<T*>(memory));
}

// What a product reads: kGated are rows of `wide`, kRounded activations that lie there.
enum class Source { kNone, kNorm, kSwiglu, kGated, kRounded, kAttention };
// What a LINEAR leaves in `wide`: its product; silu(gate) * up of it, as fp32 or as the reader's activations; or the
// rotated q of it, k and v being in the pool.
enum class Makes { kProduct, kGated, kRounded, kHeads };

struct CompiledOp {
  BatonOpKind kind;
  int layer;            // kHeads too
  const BatonMatrix* matrix;
  Source source;        // of a matrix product: what x is made of
  float eps;            // kNorm
  const float* vector;  // kNorm: weight; EMBED: rows
  Makes makes = Makes::kProduct;
  const BatonMatrix* reader = nullptr;  // kRounded: what it is multiplied with
};

int element_bytes(int format);  // of fp32, bf16, int8, and what int4 weights are multiplied with
size_t run_bytes(const BatonShape& shape);
size_t block_bytes(const BatonShape& shape);

// Elements from one row of activations to the next.
int activation_stride(int k, int format);

// Where a token's K and V lie: its block, and its place in each run of that.
struct Slot {
  uint8_t* block;
  int index;
};

// Room for activations of any format: `rows` rows of `stride` elements.
struct ActivationBuffer {
  Buffer<uint8_t> data;
  Buffer<float> scales, sums;
  Buffer<int32_t> totals;

  ActivationBuffer(size_t rows, size_t elements);
  Activations view(int k, int format) const;  // of the weights
};

// What one thread needs for itself.
struct ThreadSpace {
  ActivationBuffer activations;  // of few rows: kOwnElements
  Buffer<float> row;             // one row before it is rounded
  Buffer<float> columns;         // [kChunkRows, gate|up of kGatedPanels panels, or a head]
  Buffer<uint8_t> attention;
  uint64_t prepared = 0;         // the last product for which `activations` were made
  uint64_t begun = 0;            // the last step for which Isa::thread_begin was called
};

// Rows times k up to which every thread makes all activations of a product for itself.
constexpr int kOwnElements = 8192;
constexpr int kOwnRows = 16;

// A product takes so many rows at once, at most, that their activations and what a gated task makes of them stay in an
// L2 of 2 MB. A smaller one is no harm where AMX is not: other instruction sets read activations much more slowly.
constexpr int kChunkRows = 512;
constexpr size_t kChunkBytes = 1 << 20;
constexpr int kGatedPanels = 4;  // most panels of a gated task, of gate and of up each
constexpr int kHeadPanels = 2 * kGatedPanels;  // of a task of the LM head, which takes the same room

struct Registers;

}  // namespace baton

struct BatonProgram {
  const baton::Isa& isa;
  BatonShape shape;
  std::vector<float> frequencies;
  std::vector<BatonMatrix> matrices;
  std::vector<baton::CompiledOp> ops;
  int widest = 0;  // the longest row of `wide`, the longest k
  int longest_k = 0;
  int reserved_rows = 0;

  baton::Buffer<float> hidden, wide, mixed, rotation;
  baton::Buffer<baton::Slot> slots;
  baton::ActivationBuffer activations{0, 0};
  std::vector<baton::ThreadSpace> threads;
  int rows = 0;           // of the step in execution: fewer once only sampled rows are kept
  double* seconds = nullptr;  // of each op, the caller's; null: not timed
  uint64_t steps = 0;
  uint64_t products = 0;  // counts matrix products, to know for which of them a thread is prepared

  BatonProgram(const baton::Isa& isa, const BatonShape& shape) : isa(isa), shape(shape) {}
  // Null, or what is wrong.
  const char* compile(const BatonOp* list, int num_ops, const BatonMatrix* given, int num_matrices);
  const char* fuse(baton::CompiledOp& op, baton::Registers& registers);
  int width_of(const baton::CompiledOp& op) const;  // floats of a row that it leaves in `wide`
  // Room for a step of so many rows by so many threads; what the buffers held is gone if they had to grow.
  void reserve(int num_rows, int num_threads);
};
