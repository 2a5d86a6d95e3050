// What one launch is told: pointers, strides and lengths. Mirrored field by field by
// gqa_cutlass/launcher.py (a test compares the two layouts).
#pragma once

#include <cuda/std/cstdint>

namespace gqa {

// Distances between neighbours, in elements. The head dimension itself is contiguous.
struct RowStrides {
  int64_t batch;
  int64_t head;
};
struct CacheStrides {
  int64_t batch;
  int64_t token;
  int64_t head;
};

// When the next kernel of the stream may start, if it is launched as a dependent. Mirrored by
// gqa_cutlass/launcher.py.
enum class Overlap : int32_t {
  kNone,   // when this one is done
  kEnd,    // when this one's tiles are
  kWhole,  // as soon as this one may read; until then this one fetches its first tiles to L2
};

// In the order of their first use: the constant cache fetches lines of 64 bytes, and a miss delays
// the first loads, or waits behind them.
struct Params {
  int32_t const* seqlens;  // [batch], or null: every sequence holds `seqlen` tokens
  int32_t seqlen;          // otherwise how many may be read before lengths are known
  int32_t max_seq_len;
  int32_t num_splits;
  int32_t num_stages;  // TMA schedule: K tiles (and V tiles) that a warp keeps in flight
  Overlap overlap;     // kernels that start before the one before them is done
  float scale_log2;    // softmax_scale * log2(e): exponentials are powers of two
  void const* q;       // [batch, num_q_heads, head_dim]
  RowStrides q_stride;
  void const* k_new;  // [batch, num_kv_heads, head_dim], or null: attend only

  void const* v_new;  // likewise
  RowStrides k_new_stride;
  RowStrides v_new_stride;
  void* k_cache;  // [batch, max_seq_len, num_kv_heads, head_dim]
  void* v_cache;  // likewise
  void* out;      // [batch, num_q_heads, head_dim]

  int32_t num_kv_heads;
  CacheStrides k_cache_stride;
  CacheStrides v_cache_stride;
  RowStrides out_stride;

  float* lse;         // [batch, num_q_heads] contiguous, or null
  float* partials;    // workspace of the split merge, null when num_splits == 1
  uint32_t* tickets;  // one zero per merge; zero again afterwards
  int32_t* status;    // receives 1 + batch index of a sequence whose length is not allowed

  unsigned char reserved[24];  // up to 256 bytes, where tensor maps may follow
};

// CUtensorMap: a tensor in global memory as the copy engine sees it. The driver encodes it.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// What a kernel of the TMA schedule is told. The maps are those of K and V, swizzled by 128 bytes.
// Dimensions, innermost first, and boxes:
//   head_dim a multiple of 64:  [64, token, head_dim / 64, KV head, sequence]; 64 x kBlockN x all
//   otherwise:                  [head_dim, token, KV head, sequence]; 64 x kBlockN
struct TmaParams {
  Params decode;
  TensorMap keys;
  TensorMap values;
};

}  // namespace gqa
