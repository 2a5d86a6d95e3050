#include "gqa_attention_decode.h"

#include <string.h>

#include "gqa_internal.h"
#include "gqa_kernels.h"

// Everything behind the checks of what is passed.
static gqa_status decode(GQADecodeConfig const* config, gqa_tensors const* t, gqa_stream_t stream) {
  gqa_driver const* driver;
  gqa_cu_device device;
  gqa_target target;
  gqa_dispatch chosen;
  gqa_cu_kernel function;
  gqa_problem const problem = gqa_describe(config, gqa_vector_width(t), t->seqlens != NULL);
  gqa_status status = gqa_find_current(&driver, &device, &target);
  if (status == GQA_SUCCESS) status = gqa_find_kernel(&problem, &target, &chosen);
  if (status == GQA_SUCCESS) status = gqa_check_workspace(config, &chosen);
  if (status == GQA_SUCCESS)
    status = gqa_find_function(driver, chosen.kernel, device, target.arch, &function);
  if (status == GQA_SUCCESS)
    status = gqa_launch_kernel(driver, config, t, &chosen, function, stream);
  if (status == GQA_SUCCESS) gqa_log_launch(config, t, &chosen, device, stream);
  return status;
}

gqa_status gqa_attention_decode(void* output, void const* q, void const* k, void const* v,
                                void* kv_cache_k, void* kv_cache_v, GQADecodeConfig const* config,
                                gqa_stream_t stream) {
  void const* const addresses[kGqaTensors] = {output, q, k, v, kv_cache_k, kv_cache_v};
  gqa_tensors t;
  GQADecodeConfig own;
  gqa_status status = gqa_read_config(config, &own);
  if (status == GQA_SUCCESS) status = gqa_check_length(&own);
  if (status != GQA_SUCCESS) return status;
  gqa_lay_out(&own, addresses, &t);
  status = gqa_check_tensors(&own, &t);
  return status == GQA_SUCCESS ? decode(&own, &t, stream) : status;
}

gqa_status gqa_attention_decode_ragged(void* output, void const* q, void const* k, void const* v,
                                       void* kv_cache_k, void* kv_cache_v,
                                       int32_t const* cache_seqlens, int32_t* overflow,
                                       GQADecodeConfig const* config, gqa_stream_t stream) {
  void const* const addresses[kGqaTensors] = {output, q, k, v, kv_cache_k, kv_cache_v};
  gqa_tensors t;
  GQADecodeConfig own;
  gqa_status status = gqa_read_config(config, &own);
  if (status != GQA_SUCCESS) return status;
  gqa_lay_out(&own, addresses, &t);
  t.seqlens = cache_seqlens;
  t.overflow = overflow;
  status = gqa_check_tensors(&own, &t);
  if (status == GQA_SUCCESS) status = gqa_check_lengths(&own, &t);
  return status == GQA_SUCCESS ? decode(&own, &t, stream) : status;
}

gqa_status gqa_workspace_size(GQADecodeConfig const* config, size_t* bytes) {
  gqa_driver const* driver;
  gqa_cu_device device;
  gqa_target target;
  gqa_dispatch chosen;
  size_t largest = 0;
  GQADecodeConfig own;
  gqa_status status = gqa_read_config(config, &own);
  if (status != GQA_SUCCESS) return status;
  if (bytes == NULL) {
    return gqa_fail(GQA_ERROR_NULL_POINTER, "bytes: got null; needed: where to write the size.");
  }
  status = gqa_find_current(&driver, &device, &target);
  for (int32_t width = 8; status == GQA_SUCCESS && width >= 1; width /= 2) {
    for (int ragged = 0; status == GQA_SUCCESS && ragged < 2; ++ragged) {
      gqa_problem const problem = gqa_describe(&own, width, ragged);
      if (width < 8 && !gqa_choose(&problem, &target, &chosen)) continue;  // no narrower kernels
      status = gqa_find_kernel(&problem, &target, &chosen);
      if (status == GQA_SUCCESS && gqa_workspace_of(&chosen) > largest)
        largest = gqa_workspace_of(&chosen);
    }
  }
  if (status == GQA_SUCCESS) *bytes = largest;
  return status;
}

gqa_status gqa_prepare(GQADecodeConfig const* config) {
  gqa_driver const* driver;
  gqa_cu_device device;
  gqa_target target;
  gqa_dispatch chosen;
  gqa_cu_kernel function;
  GQADecodeConfig own;
  gqa_status status = gqa_read_config(config, &own);
  if (status == GQA_SUCCESS) status = gqa_find_current(&driver, &device, &target);
  for (int ragged = 0; status == GQA_SUCCESS && ragged < 2; ++ragged) {
    gqa_problem const problem = gqa_describe(&own, gqa_aligned_width(&own), ragged);
    status = gqa_find_kernel(&problem, &target, &chosen);
    if (status == GQA_SUCCESS)
      status = gqa_find_function(driver, chosen.kernel, device, target.arch, &function);
  }
  return status;
}

static int32_t find_arch(char const* name) {
  for (int32_t i = 0; i < gqa_num_archs; ++i) {
    if (strcmp(gqa_archs[i].name, name) == 0) return i;
  }
  return -1;
}

// Writes what was chosen as far as the caller's structure goes, which may be older or newer.
static void give(gqa_dispatch const* chosen, gqa_launch* launched) {
  size_t const size = launched->struct_size;
  gqa_launch found = GQA_LAUNCH_INIT;
  found.struct_size = size;
  found.kernel = chosen->kernel->name;
  memcpy(found.grid, chosen->grid, sizeof found.grid);
  found.cluster = chosen->cluster;
  found.block = chosen->block;
  found.shared_bytes = chosen->shared_bytes;
  found.num_splits = chosen->num_splits;
  found.num_stages = chosen->num_stages;
  found.workspace_size = gqa_workspace_of(chosen);
  if (size <= sizeof found) {
    memcpy(launched, &found, size);
  } else {
    memset((char*)launched + sizeof found, 0, size - sizeof found);
    *launched = found;
  }
}

gqa_status gqa_explain(GQADecodeConfig const* config, char const* arch, int32_t num_sms,
                       int32_t ragged, gqa_launch* launched) {
  gqa_dispatch chosen;
  gqa_target target;
  gqa_problem problem;
  GQADecodeConfig own;
  gqa_status status = gqa_read_config(config, &own);
  if (status != GQA_SUCCESS) return status;
  if (arch == NULL || launched == NULL) {
    return gqa_fail(GQA_ERROR_NULL_POINTER, "arch and launch: got null; needed: both.");
  }
  status = gqa_check_launch(launched);
  if (status != GQA_SUCCESS) return status;
  memset(&target, 0, sizeof target);
  target.arch = find_arch(arch);
  target.num_sms = num_sms;
  if (target.arch < 0) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "arch: got %.32s; allowed: what was exported, %s for "
                    "instance.",
                    arch, gqa_archs[0].name);
  }
  if (num_sms < 1) return gqa_fail_range("num_sms", num_sms, 1, INT32_MAX);
  problem = gqa_describe(&own, gqa_aligned_width(&own), ragged != 0);
  status = gqa_find_kernel(&problem, &target, &chosen);
  if (status != GQA_SUCCESS) return status;
  give(&chosen, launched);
  return GQA_SUCCESS;
}

int32_t gqa_kernel_count(void) { return gqa_num_kernels; }

char const* gqa_kernel_name(int32_t index) {
  return index >= 0 && index < gqa_num_kernels ? gqa_kernels[index].name : NULL;
}

char const* gqa_arch_name(int32_t index) {
  return index >= 0 && index < gqa_num_archs ? gqa_archs[index].name : NULL;
}
