#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "gqa_internal.h"
#include "gqa_kernels.h"
#include "gqa_params.h"

enum { kMaxAttributes = 2 };

static pthread_mutex_t logging = PTHREAD_MUTEX_INITIALIZER;
static gqa_log_callback log_callback;
static void* log_user;

static gqa_row_strides row_strides(gqa_view const* view) {
  gqa_row_strides const strides = {view->strides[kGqaBatch], view->strides[kGqaHead]};
  return strides;
}

static gqa_cache_strides cache_strides(gqa_view const* view) {
  gqa_view const pairs = gqa_in_pairs(view);
  gqa_cache_strides const strides = {pairs.strides[kGqaBatch], pairs.strides[kGqaToken],
                                     pairs.strides[kGqaHead]};
  return strides;
}

static gqa_params bind(GQADecodeConfig const* config, gqa_tensors const* t,
                       gqa_dispatch const* chosen) {
  gqa_view const* views = t->views;
  gqa_params params;
  memset(&params, 0, sizeof params);
  params.seqlens = t->seqlens;
  params.seqlen = t->seqlens == NULL ? config->cache_len : 0;
  params.prefetch_limit = t->seqlens == NULL            ? config->cache_len
                          : chosen->prefetch_first_tile ? config->max_seq_len
                                                        : 0;
  params.max_seq_len = config->max_seq_len;
  params.num_splits = chosen->num_splits;
  params.num_stages = chosen->num_stages;
  params.pdl = chosen->pdl;
  params.row_blocks = (int32_t)gqa_row_blocks(chosen->kernel, gqa_query_tokens(config));
  params.q = (void const*)views[kGqaQ].address;
  params.q_stride = row_strides(&views[kGqaQ]);
  params.k_new = (void const*)views[kGqaK].address;
  params.v_new = (void const*)views[kGqaV].address;
  params.k_new_stride = row_strides(&views[kGqaK]);
  params.v_new_stride = row_strides(&views[kGqaV]);
  params.num_kv_heads = config->num_kv_heads;
  params.scale_log2 = (float)((double)config->scale * kLog2E);
  params.k_cache = (void*)views[kGqaKCache].address;
  params.v_cache = (void*)views[kGqaVCache].address;
  params.out = (void*)views[kGqaOutput].address;
  params.k_cache_stride = cache_strides(&views[kGqaKCache]);
  params.v_cache_stride = cache_strides(&views[kGqaVCache]);
  params.out_stride = row_strides(&views[kGqaOutput]);
  params.lse = config->lse;
  params.overflow_flag = t->overflow;
  if (chosen->num_merge_counters > 0) {
    params.merge_counters = (uint32_t*)config->workspace;
    params.split_workspace = (float*)((char*)config->workspace + kMergeCounterBytes);
  }
  gqa_bind_features(config, &params);
  gqa_bind_tokens(config, t, &params);
  return params;
}

// From one to the next; where there is but one, what was given need be no multiple of 16 bytes.
static uint64_t step_bytes(gqa_view const* cache, int dim) {
  int64_t const one = cache->sizes[kGqaElement];
  int64_t const step = cache->sizes[dim] > 1 ? cache->strides[dim] : one;
  return (uint64_t)(step * cache->element_bytes);
}

// The tensor map of a cache: boxes of 64 dims; where head_dim is a multiple of that, it is two
// dimensions of the map, so that one copy brings whole rows.
static gqa_cu_result encode(gqa_driver const* driver, gqa_view const* given, int32_t box_tokens,
                            gqa_tensor_map* map) {
  gqa_view const pairs = gqa_in_pairs(given), *const cache = &pairs;
  uint32_t const columns = (uint32_t)gqa_dispatch_model.box_dims;
  uint64_t const dim = (uint64_t)cache->sizes[kGqaElement];
  uint64_t const heads = (uint64_t)cache->sizes[kGqaHead];
  uint64_t const tokens = (uint64_t)cache->sizes[kGqaToken];
  uint64_t const batch = (uint64_t)cache->sizes[kGqaBatch];
  uint64_t const token = step_bytes(cache, kGqaToken), head = step_bytes(cache, kGqaHead);
  uint64_t const sequence = step_bytes(cache, kGqaBatch);
  uint32_t const ones[5] = {1, 1, 1, 1, 1};
  void* const address = (void*)cache->address;
  if (dim % columns == 0) {
    uint32_t const boxes = (uint32_t)(dim / columns);
    uint64_t const sizes[5] = {columns, tokens, boxes, heads, batch};
    uint64_t const strides[4] = {token, (uint64_t)columns * kElementBytes, head, sequence};
    uint32_t const box[5] = {columns, (uint32_t)box_tokens, boxes, 1, 1};
    return driver->encode(map, kCuTensorMapUint16, 5, address, sizes, strides, box, ones, 0,
                          kCuTensorMapSwizzle128, 0, 0);
  }
  uint64_t const sizes[4] = {dim, tokens, heads, batch};
  uint64_t const strides[3] = {token, head, sequence};
  uint32_t const box[4] = {columns, (uint32_t)box_tokens, 1, 1};
  return driver->encode(map, kCuTensorMapUint16, 4, address, sizes, strides, box, ones, 0,
                        kCuTensorMapSwizzle128, 0, 0);
}

// What a launch asks for beyond grid, block and shared memory; returns how many.
static uint32_t describe(gqa_dispatch const* chosen, gqa_cu_attribute* attributes) {
  uint32_t count = 0;
  memset(attributes, 0, kMaxAttributes * sizeof *attributes);
  if (chosen->cluster > 1) {
    attributes[count].id = kCuClusterDimension;
    attributes[count].value[0] = 1;
    attributes[count].value[1] = chosen->cluster;
    attributes[count++].value[2] = 1;
  }
  if (chosen->pdl != kGqaPdlNone) {
    attributes[count].id = kCuProgrammaticStreamSerialization;
    attributes[count++].value[0] = 1;
  }
  return count;
}

gqa_status gqa_launch_kernel(gqa_driver const* driver, GQADecodeConfig const* config,
                             gqa_tensors const* t, gqa_dispatch const* chosen,
                             gqa_cu_kernel function, gqa_stream_t stream) {
  gqa_tma_params argument;
  void* pointers[1] = {&argument};
  gqa_cu_attribute attributes[kMaxAttributes];
  gqa_cu_launch launched;
  gqa_cu_result error = kCuSuccess;
  argument.decode = bind(config, t, chosen);
  if (chosen->kernel->tma) {
    int32_t const box_tokens = config->block_table == NULL
                                   ? chosen->kernel->block_n
                                   : (int32_t)gqa_dispatch_model.page_tokens;
    error = encode(driver, &t->views[kGqaKCache], box_tokens, &argument.keys);
    if (error == kCuSuccess) {
      error = encode(driver, &t->views[kGqaVCache], box_tokens, &argument.values);
    }
    if (error != kCuSuccess) {
      return gqa_fail_in_driver(driver, error, GQA_ERROR_LAUNCH, "describing", "the caches");
    }
  }
  memset(&launched, 0, sizeof launched);
  memcpy(launched.grid, chosen->grid, sizeof launched.grid);
  launched.block[0] = chosen->block;
  launched.block[1] = launched.block[2] = 1;
  launched.shared_bytes = chosen->shared_bytes;
  launched.stream = stream;
  launched.attributes = attributes;
  launched.num_attributes = describe(chosen, attributes);
  error = driver->launch(&launched, (void*)function, pointers, NULL);
  if (error != kCuSuccess) {
    return gqa_fail_in_driver(driver, error, GQA_ERROR_LAUNCH, "launching", chosen->kernel->name);
  }
  return GQA_SUCCESS;
}

static char const* text_of(void const* given) { return given == NULL ? "False" : "True"; }

void gqa_log_launch(GQADecodeConfig const* config, gqa_tensors const* t, gqa_dispatch const* chosen,
                    gqa_cu_device device, gqa_stream_t stream) {
  char line[1024];
  char length[16] = "device";
  char const* const dtype = config->dtype == GQA_FLOAT16 ? "f16" : "bf16";
  char cap[32];
  if (__atomic_load_n(&log_callback, __ATOMIC_ACQUIRE) == NULL) return;
  pthread_mutex_lock(&logging);
  gqa_log_callback const callback = log_callback;
  void* user = log_user;
  pthread_mutex_unlock(&logging);
  if (callback == NULL) return;
  snprintf(cap, sizeof cap, config->softcap == floorf(config->softcap) ? "%.1f" : "%.9g",
           (double)config->softcap);  // 50.0, as Python has it
  if (t->seqlens == NULL) snprintf(length, sizeof length, "%d", config->cache_len);
  snprintf(line, sizeof line,
           "launch kernel=%s grid=%u,%u,%u cluster=1,%u,1 block=%u shared_bytes=%u num_splits=%d "
           "num_stages=%d dependent=%s batch_size=%d num_q_heads=%d num_kv_heads=%d "
           "group_size=%d head_dim=%d head_dim_v=%d max_seq_len=%d num_tokens=%d num_new_tokens=%d "
           "dtype=%s out_dtype=%s append=True "
           "cache_seqlens=%s softmax_scale=%.9g return_lse=%s softcap=%s sinks=%s "
           "window_size=%d,%d alibi=%s leftpad=%s batch_idx=%s page_size=%d "
           "workspace_bytes=%zu device=%d stream=0x%llx",
           chosen->kernel->name, chosen->grid[0], chosen->grid[1], chosen->grid[2], chosen->cluster,
           chosen->block, chosen->shared_bytes, chosen->num_splits, chosen->num_stages,
           chosen->pdl == kGqaPdlNone ? "False" : "True", config->batch_size, config->num_q_heads,
           config->num_kv_heads, config->num_q_heads / config->num_kv_heads, config->head_dim,
           gqa_value_dim(config), config->max_seq_len, gqa_query_tokens(config),
           gqa_new_tokens(config), dtype, config->output_float32 ? "f32" : dtype, length,
           (double)config->scale, text_of(config->lse), cap, text_of(config->sinks),
           config->window - 1, config->not_causal ? config->window_right - 1 : -1,
           text_of(config->alibi_slopes), text_of(config->cache_leftpad),
           text_of(config->cache_batch_idx), config->page_size, gqa_workspace_of(chosen), device,
           (unsigned long long)(uintptr_t)stream);
  callback(line, user);
}

void gqa_set_log_callback(gqa_log_callback callback, void* user) {
  pthread_mutex_lock(&logging);
  log_user = user;
  __atomic_store_n(&log_callback, callback, __ATOMIC_RELEASE);
  pthread_mutex_unlock(&logging);
}
