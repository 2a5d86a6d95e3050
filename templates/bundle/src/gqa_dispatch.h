// Problem to kernel and launch shape: the decisions of the Python package's dispatch.py, which a
// test compares with these.
#ifndef GQA_DISPATCH_H_
#define GQA_DISPATCH_H_

#include <stdint.h>

#include "gqa_attention_decode.h"
#include "gqa_kernels.h"
#include "gqa_visibility.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct gqa_problem {
  int64_t batch_size;
  int64_t num_q_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t max_seq_len;
  int32_t dtype;
  int32_t vec_width;  // widest access, in elements, that every address allows
  int32_t ragged;     // whether the host does not know the lengths
} gqa_problem;

// Where it will run: an index into gqa_archs, and the multiprocessors.
typedef struct gqa_target {
  int32_t arch;
  int32_t num_sms;
} gqa_target;

typedef struct gqa_dispatch {
  gqa_kernel const* kernel;
  uint32_t grid[3];  // KV heads times head blocks, splits, sequences
  uint32_t cluster;
  uint32_t block;
  uint32_t shared_bytes;
  int32_t num_splits;
  int32_t num_stages;
  int32_t early;           // whether warps ask for their first tile before they know the length
  int64_t num_tickets;     // counters, of merges in global memory
  int64_t partial_floats;  // floats of partial outputs in global memory
} gqa_dispatch;

// Zero where this library has no kernel for the problem.
GQA_INTERNAL int gqa_choose(gqa_problem const* problem, gqa_target const* target,
                            gqa_dispatch* chosen);

// Index of the architecture among those exported that fits a compute capability best, or -1.
GQA_INTERNAL int32_t gqa_find_arch(int32_t capability);

#ifdef __cplusplus
}
#endif

#endif  // GQA_DISPATCH_H_
