/* The C interface of the host kernels: what Python fills in and calls, once per step (kernels/host/library.py mirrors
   it by ctypes). Plain C: no torch, no C++ types. Sizes are elements unless the name says bytes; rows are contiguous.

   Life of a program:
   1. baton_pack_* turn each weight matrix into panels (pack.h says how they lie), in memory that the caller owns.
   2. baton_program_new copies the op list and the descriptors of the matrices; the memory behind them stays the
      caller's and must outlive the program.
   3. baton_step runs ops [first_op, ...) over one batch, on a team of threads. It returns the index of the op it
      stopped at, a COLLECTIVE or CAPTURE op (go on with the one after it, and the same batch), or num_ops.
      `*layers_done` counts the layers whose K and V are in the pool, release-ordered; another thread may read it at
      any time.
   4. baton_program_free. One step at a time per program. */
#pragma once
#include <stdint.h>

#pragma GCC visibility push(default) /* everything else is hidden */
#ifdef __cplusplus
extern "C" {
#endif

#define BATON_ABI_VERSION 1

typedef enum { BATON_FP32 = 0, BATON_BF16 = 1, BATON_INT8 = 2, BATON_INT4 = 3 } BatonFormat;

/* A packed weight matrix W [n, k]; y = x W^T. See pack.h for the panels of each format; scales lie in them. */
typedef struct {
  const void* panels;
  int32_t n, k;
  int32_t format;       /* BatonFormat */
  int32_t reserved;
} BatonMatrix;

typedef enum {
  BATON_OP_EMBED = 0,          /* hidden = embed[token] (fp32 rows); NaN where a token is not in [0, vocab_size) */
  BATON_OP_RMS_NORM,           /* x = rms_norm(hidden) * vector, in the activation format of the next linear, which
                                  takes it (so nothing may write hidden in between) */
  BATON_OP_LINEAR,             /* wide = x W^T (fp32) */
  BATON_OP_LINEAR_RESIDUAL,    /* hidden += x W^T */
  BATON_OP_ROPE_WRITE_KV,      /* right after the LINEAR that makes q|k|v: rotate q and k, write k and v of `layer` into
                                  the pool, wide = q */
  BATON_OP_ATTENTION,          /* x = attention of q over the pool, in the activation format of the next linear */
  BATON_OP_KEEP_SAMPLED_ROWS,  /* keep only rows that are sampled; none: the step ends here */
  BATON_OP_SWIGLU,             /* wide is gate|up: x = silu(gate) * up */
  BATON_OP_LM_HEAD,            /* logits = x W^T, fp32 [num_sampled, n] */
  BATON_OP_COLLECTIVE,         /* stop: the caller sums `hidden` over ranks */
  BATON_OP_CAPTURE             /* stop: the caller reads `hidden` */
} BatonOpKind;

typedef struct {
  int32_t kind;         /* BatonOpKind */
  int32_t layer;        /* ROPE_WRITE_KV, ATTENTION */
  int32_t matrix;       /* index into the program's matrices, or -1 */
  float eps;            /* RMS_NORM */
  const float* vector;  /* RMS_NORM: weight [hidden]; EMBED: rows [vocab, hidden] fp32 */
} BatonOp;

/* How a model and its KV pool are shaped. A block is [layer][kv_head][K|V] runs; a run is [token][dim] elements of
   kv_format, and for int8 then [token] fp32 scales (value = element * scale). */
typedef struct {
  int32_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size;
  int32_t num_layers, block_size;
  int32_t kv_format;              /* BATON_FP32, BATON_BF16 or BATON_INT8 */
  int32_t reserved;
  const float* rope_frequencies;  /* [head_dim / 2] fp32: an angle is position * frequency, in fp32; copied */
} BatonShape;

/* Consecutive rows of one sequence: positions [start, start + num_rows), KV through blocks[first_block ...]. */
typedef struct {
  int32_t row, num_rows, start, first_block;
} BatonSpan;

typedef struct {
  const int32_t* tokens;        /* [num_rows] */
  const BatonSpan* spans;       /* [num_spans], rows in order, no gaps */
  const int32_t* blocks;        /* all spans' block tables, one after the other */
  const int32_t* sampled_rows;  /* [num_sampled], rising */
  uint8_t* pool;                /* num_blocks * block bytes, 64-byte aligned */
  float* logits;                /* [num_sampled, vocab_size], or null if num_sampled is 0 */
  int32_t* argmax;              /* [num_sampled]: index of the greatest logit (the first of equals; NaN is greater
                                   than all), or null */
  int32_t* layers_done;
  int32_t num_rows, num_spans, num_sampled, reserved;
} BatonBatch;

/* How a sampled row becomes a token; engine/sampler.py says what the filters and the counter mean. */
typedef struct {
  uint64_t seed, position;  /* key and part of the counter of its draw */
  double temperature;       /* 0: the greatest logit, whatever the rest says */
  double top_p, min_p;      /* 1 and 0: off */
  int32_t top_k;            /* 0: off */
  int32_t choice;           /* part of the counter */
} BatonChoice;

/* tokens[row] is what sampled row `sampled` of the job before became. */
typedef struct {
  int32_t row, sampled;
} BatonSource;

/* A step for a line. All of it is the caller's, and left alone from baton_line_put until it is done. */
typedef struct {
  BatonBatch batch;            /* with argmax, and without first_op: a whole step */
  int32_t* tokens;             /* batch.tokens, which `sources` complete */
  const BatonSource* sources;  /* [num_sources] */
  const BatonChoice* choices;  /* [num_sampled] */
  int32_t* chosen;             /* [num_sampled], out */
  float* greatest;             /* [num_sampled], out: the greatest logit. Not finite: `chosen` means nothing */
  double began_s, ended_s;     /* out, on CLOCK_MONOTONIC */
  int32_t num_sources;
  int32_t done;                /* 0 while the line has it; an event loop reads it when the eventfd told */
} BatonJob;

typedef struct BatonProgram BatonProgram;
typedef struct BatonTeam BatonTeam;
typedef struct BatonLine BatonLine;

int32_t baton_abi_version(void);
/* The best instruction set of this CPU among "amx", "avx512" (with bf16 and vnni), "avx2", "scalar". */
const char* baton_best_isa(void);
/* 1 if this CPU has `isa`. */
int32_t baton_has_isa(const char* isa);

/* num_threads >= 1, the caller's own included. Threads spin for spin_us between phases, then sleep on a futex. */
BatonTeam* baton_team_new(int32_t num_threads, int32_t spin_us);
void baton_team_free(BatonTeam* team);
/* Reads all of it, in one stream per thread, as fast as this machine gives it: what products of one row are held
   against. Returns something made of it. */
int64_t baton_read(BatonTeam* team, const void* memory, int64_t num_bytes);

/* Bytes of a packed [n, k] matrix; multiple of 64. */
int64_t baton_packed_bytes(int32_t format, int32_t n, int32_t k);
/* Into `panels` (64-byte aligned, baton_packed_bytes long). int8 has one scale per output channel. */
void baton_pack_fp32(const float* w, int32_t n, int32_t k, void* panels);
void baton_pack_bf16(const float* w, int32_t n, int32_t k, void* panels);
void baton_pack_int8(const float* w, int32_t n, int32_t k, void* panels);
/* w = q * scale - minimum, per group of 32 along k: q [n, k] uint8 0..15, scale and minimum [n, k / 32] fp32, kept in
   fp16 (what GGUF's Q4_0 and Q4_1 hold). k is a multiple of 32. */
void baton_pack_int4(const uint8_t* q, const float* scale, const float* minimum, int32_t n, int32_t k, void* panels);

/* Null and *error (a static string) if the program makes no sense or the CPU lacks `isa`. */
BatonProgram* baton_program_new(const char* isa, const BatonShape* shape, const BatonOp* ops, int32_t num_ops,
                                const BatonMatrix* matrices, int32_t num_matrices, const char** error);
void baton_program_free(BatonProgram* program);
/* The residual stream [num_rows, hidden_size] fp32 of the step that stopped; the caller may write it. */
float* baton_program_hidden(BatonProgram* program);
/* From now on every op adds the seconds it takes to seconds[its index], num_ops long; null: no more. What RMS_NORM,
   SWIGLU and ROPE_WRITE_KV would take is in the products before or after, which do their work. */
void baton_program_time(BatonProgram* program, double* seconds);
int32_t baton_step(BatonProgram* program, BatonTeam* team, const BatonBatch* batch, int32_t first_op);

/* A thread that runs jobs in the order in which they are put, each the moment the one before it is done: the caller
   prepares the next one meanwhile. Program and team are the line's until it is freed, but for a time without jobs. */
BatonLine* baton_line_new(BatonProgram* program, BatonTeam* team);
/* An eventfd, the line's, that counts jobs as they are done: readable, so that an event loop can wait for them. */
int32_t baton_line_fd(const BatonLine* line);
void baton_line_put(BatonLine* line, BatonJob* job);
/* Until the job, which was put, is done. */
void baton_line_wait(BatonLine* line, BatonJob* job);
/* All jobs must be done. */
void baton_line_free(BatonLine* line);

/* Single operations, for tests and benches, by the same code that a step runs. All on the calling thread or team. */
/* y [m, n] = (accumulate ? y : 0) + x W^T; x fp32 [m, k] is converted to the matrix' activation format first. */
void baton_linear(const char* isa, BatonTeam* team, const float* x, int32_t m, const BatonMatrix* w, float* y,
                  int32_t accumulate);
/* out [num_rows, num_heads, head_dim] from rotated q of the same shape, over `layer` of the batch's pool. */
void baton_attention(const char* isa, BatonTeam* team, const BatonShape* shape, const BatonBatch* batch, int32_t layer,
                     const float* q, float* out);

/* The token that a row of n logits becomes; `greatest` is where the greatest lies. */
int32_t baton_choose(const char* isa, const float* logits, int32_t n, int32_t greatest, const BatonChoice* choice);

/* The row operations of isa.h, one row each. `run` is a K or V run of a block; `slot` a token's place in it. */
void baton_rms_norm(const char* isa, const float* x, const float* weight, float eps, int32_t n, float* out);
void baton_swiglu(const char* isa, const float* gate_up, int32_t n, float* out);
void baton_rope(const char* isa, float* head, const float* cos_sin, int32_t head_dim);
void baton_store_kv(const char* isa, const float* values, int32_t format, int32_t head_dim, int32_t block_size,
                    int32_t slot, uint8_t* run);
/* K and V runs, one after the other, from shape->kv_format to another of the three; of the shape, head_dim and
   block_size count too. Slots are converted whether they are filled or not: zeros stay zeros. */
void baton_convert_kv(const char* isa, const BatonShape* shape, const uint8_t* from, int32_t num_runs,
                      int32_t to_format, uint8_t* to);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
