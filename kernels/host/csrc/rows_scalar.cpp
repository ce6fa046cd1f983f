#include "vector_scalar.h"

#include "parts.h"
#include "rows_vector.h"

namespace baton::scalar {

void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  rms_norm_row(x, weight, eps, n, out);
}

void swiglu(const float* gate_up, int n, float* out) { swiglu_row(gate_up, n, out); }

void rope(float* head, const float* cos_sin, int head_dim) { rope_row(head, cos_sin, head_dim); }

void weigh(const float* logits, int n, float most, float temperature, float* out) {
  weigh_row(logits, n, most, temperature, out);
}

float keep_logits(const float* logits, int n, bool far, float* out) { return keep_logits_row(logits, n, far, out); }

void store_kv(const float* values, int format, int head_dim, int block_size, int slot, uint8_t* run) {
  store_kv_row(values, format, head_dim, block_size, slot, run);
}

}  // namespace baton::scalar
