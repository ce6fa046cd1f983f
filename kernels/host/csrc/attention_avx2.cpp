#include "vector_avx2.h"

#include "attention_vector.h"
#include "parts.h"

namespace baton::avx2 {

void attention(const AttentionTask& task, uint8_t* scratch) { Attention<Whole>(task, scratch).run(); }

size_t attention_scratch_bytes(const BatonShape& shape) { return Attention<Whole>::scratch_bytes(shape); }

int attention_rows() { return kRowsPerTask; }

}  // namespace baton::avx2
