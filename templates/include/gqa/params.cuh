// What one launch is told: pointers, strides and lengths. Mirrored field by field by
// gqa_cutlass/launcher.py (a test compares the two layouts).
#pragma once

#include <cuda/std/cstdint>

namespace gqa {

// Distances between neighbours, in elements. The head dimension itself is contiguous.
struct Strides {
  int64_t batch;
  int64_t token;  // unused for q, the new token and the output: they hold one token per sequence
  int64_t head;
};

struct Params {
  void const* q;           // [batch, num_q_heads, head_dim]
  void const* k_new;       // [batch, num_kv_heads, head_dim], or null: attend only
  void const* v_new;       // likewise
  void* k_cache;           // [batch, max_seq_len, num_kv_heads, head_dim]
  void* v_cache;           // likewise
  void* out;               // [batch, num_q_heads, head_dim]
  float* lse;              // [batch, num_q_heads] contiguous, or null
  int32_t const* seqlens;  // [batch], or null: every sequence holds `seqlen` tokens
  float* partials;         // workspace of the split merge, null when num_splits == 1
  uint32_t* tickets;       // one zero per (batch, KV head, head block); zero again afterwards
  int32_t* status;         // receives 1 + batch index of a sequence whose length is not allowed
  Strides q_stride;
  Strides k_new_stride;
  Strides v_new_stride;
  Strides k_cache_stride;
  Strides v_cache_stride;
  Strides out_stride;
  int32_t seqlen;
  int32_t max_seq_len;
  int32_t num_kv_heads;
  int32_t num_splits;
  float scale_log2;  // softmax_scale * log2(e): exponentials are powers of two
};

}  // namespace gqa
