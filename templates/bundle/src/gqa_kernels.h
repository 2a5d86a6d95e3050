// The kernels of this library, as data. gqa_kernels.c holds what was exported.
#ifndef GQA_KERNELS_H_
#define GQA_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#include "gqa_visibility.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { kGqaMaxKernels = 4096, kGqaMaxStages = 8, kGqaMaxArchs = 8 };

// A GPU architecture that kernels were compiled for.
typedef struct gqa_arch {
  char const* name;
  int32_t capability;  // 90 for compute capability 9.0
  int32_t exact;       // whether it runs on that capability alone
} gqa_arch;

typedef struct gqa_kernel {
  char const* name;       // and entry point
  uint64_t const* image;  // fat binary
  int32_t dtype;          // gqa_dtype
  int32_t head_dim;
  int32_t group_size;
  int32_t vec_width;  // elements per access that every address must allow
  int32_t tma;        // schedule: tensor copies and clusters
  int32_t block_n;    // KV tokens per tile
  int32_t num_warps;
  int32_t num_stages;                   // with tma: at most
  int32_t head_blocks;                  // blocks that share a KV head
  int32_t partial_floats;               // floats of a partial output in the workspace
  int32_t tile_bytes;                   // of K and V in the cache
  int32_t bytes_in_flight;              // that one block can have under way
  int32_t shared_bytes[kGqaMaxStages];  // by stages in use - 1
  int32_t blocks_per_sm[kGqaMaxArchs];  // by architecture; 0: not compiled for it
} gqa_kernel;

// The dispatch model's measured constants.
typedef struct gqa_model {
  double bytes_per_sm_and_microsecond;
  double microseconds_per_split;
  double bytes_in_flight;
  double tma_mib;
  double tma_mib_partial_boxes;
  int64_t tma_heads;
  int64_t tma_blocks;
  int64_t tma_large_heads;
  int64_t tma_large_cluster;
  int64_t tma_few_heads;
  int64_t box_dims;
  int64_t max_cluster;
  double early_mib;
  int64_t balanced_batch;
  int64_t balanced_tokens;
  int64_t balanced_rounds;
  int64_t most_tiles;
} gqa_model;

// What configurations may hold.
typedef struct gqa_limits {
  int32_t min_head_dim;
  int32_t max_head_dim;
  int32_t head_dim_step;
  int32_t max_batch;
  int32_t max_seq_len;
  int32_t max_group_size;
  int32_t min_capability;
  float max_scale;
} gqa_limits;

extern GQA_INTERNAL gqa_arch const gqa_archs[];
extern GQA_INTERNAL int32_t const gqa_num_archs;
extern GQA_INTERNAL gqa_kernel const gqa_kernels[];
extern GQA_INTERNAL int32_t const gqa_num_kernels;
extern GQA_INTERNAL gqa_model const gqa_dispatch_model;
extern GQA_INTERNAL gqa_limits const gqa_config_limits;

#ifdef __cplusplus
}
#endif

#endif  // GQA_KERNELS_H_
