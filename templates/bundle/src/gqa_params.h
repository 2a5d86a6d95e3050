// The kernels' argument, as templates/include/gqa/params.cuh has it; gqa_kernels.c asserts the
// offsets, which are taken from the Python package.
#ifndef GQA_PARAMS_H_
#define GQA_PARAMS_H_

#include <stdint.h>

#include "gqa_driver.h"

// Distances between neighbours, in elements.
typedef struct gqa_row_strides {
  int64_t batch;
  int64_t head;
} gqa_row_strides;

typedef struct gqa_cache_strides {
  int64_t batch;
  int64_t token;
  int64_t head;
} gqa_cache_strides;

typedef struct gqa_params {
  int32_t const* seqlens;
  int32_t seqlen;
  int32_t max_seq_len;
  int32_t num_splits;
  int32_t num_stages;
  int32_t overlap;  // always 0: these kernels start when the one before them is done
  float scale_log2;
  void const* q;
  gqa_row_strides q_stride;
  void const* k_new;
  void const* v_new;
  gqa_row_strides k_new_stride;
  gqa_row_strides v_new_stride;
  void* k_cache;
  void* v_cache;
  void* out;
  int32_t num_kv_heads;
  gqa_cache_strides k_cache_stride;
  gqa_cache_strides v_cache_stride;
  gqa_row_strides out_stride;
  float* lse;
  float* partials;
  uint32_t* tickets;
  int32_t* status;
  unsigned char reserved[24];
} gqa_params;

// Of the schedule with tensor copies. Kernels want the maps at multiples of 64 bytes of the
// argument, which the driver copies from wherever it is.
typedef struct gqa_tma_params {
  gqa_params decode;
  gqa_tensor_map keys;
  gqa_tensor_map values;
} gqa_tma_params;

#endif  // GQA_PARAMS_H_
