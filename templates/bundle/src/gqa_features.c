// What a configuration may ask for beyond plain attention: what it says, what it reads, and what
// the kernels are told.
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "gqa_internal.h"
#include "gqa_kernels.h"
#include "gqa_params.h"

int32_t gqa_features_of(GQADecodeConfig const* config) {
  int32_t features = 0;
#define ADD(bit, field) \
  if (config->field != 0) features |= bit;
  GQA_FEATURES(ADD)
#undef ADD
  if (config->k_norm_weight != NULL) features |= kGqaRmsNormed;
  features &=
      ~kGqaSeveralQueries;  // one token asks for nothing, and drafts have a kernel of theirs
  features = (features & ~kGqaStored) | gqa_stored_as(config);
  if (config->tree_mask == NULL && gqa_several_tokens(config)) features |= kGqaSeveralQueries;
  return features;
}

void gqa_name_features(int32_t features, char* text, size_t size) {
  size_t used = 0;
  text[0] = '\0';
#define ADD(bit, field)                                                                       \
  if ((features & bit) != 0 && used < size) {                                                 \
    used += (size_t)snprintf(text + used, size - used, "%s%s", used > 0 ? ", " : "", #field); \
  }
  GQA_FEATURES(ADD)
#undef ADD
}

int64_t gqa_cache_rows(GQADecodeConfig const* config) {
  return config->cache_rows == 0 ? config->batch_size : config->cache_rows;
}

void gqa_feature_tensors(GQADecodeConfig const* config, gqa_memory tensors[kGqaFeatureTensors]) {
  int64_t const batch = config->batch_size, heads = config->num_q_heads;
  int32_t const number = gqa_number_bytes(config->sinks_type);
  int32_t const of_q = gqa_number_bytes(config->q_norm_type);
  int32_t const of_k = gqa_number_bytes(config->k_norm_type);
  int32_t const pair = 2 * gqa_number_bytes(config->rotary_type);
  int64_t const dim = config->head_dim;
  int64_t const slopes = config->alibi_batch_stride == 0 ? heads : batch * heads;
  int const scales_are_read = !config->scales_of_tokens;
  gqa_memory const found[kGqaFeatureTensors] = {
      {"sinks", config->sinks, heads * number, number},
      {"alibi_slopes", config->alibi_slopes, 4 * slopes, 4},
      {"cache_leftpad", config->cache_leftpad, 4 * batch, 4},
      {"cache_batch_idx", config->cache_batch_idx, 4 * batch, 4},
      {"block_table", config->block_table, gqa_table_bytes(config), 4},
      {"slot_mapping", config->slot_mapping, 8 * gqa_all_new_tokens(config), 8},
      {"cu_seqlens_q", config->cu_seqlens_q, 4 * (batch + 1), 4},
      {"cu_seqlens_k_new", config->cu_seqlens_k_new, 4 * (batch + 1), 4},
      {"tree_mask", config->tree_mask, gqa_tree_bytes(config), 4},
      {"q_norm_weight", config->q_norm_weight, dim * of_q, of_q},
      {"k_norm_weight", config->k_norm_weight, dim * of_k, of_k},
      {"rotary_cos", config->rotary_cos, gqa_rotary_bytes(config, config->rotary_cos_stride), pair},
      {"rotary_sin", config->rotary_sin, gqa_rotary_bytes(config, config->rotary_sin_stride), pair},
      {"rotary_seqlens", config->rotary_seqlens, 4 * batch, 4},
      {"k_scales", scales_are_read ? config->k_scales : NULL,
       gqa_scale_bytes(config, config->k_scale_batch_stride, config->k_scale_head_stride), 4},
      {"v_scales", scales_are_read ? config->v_scales : NULL,
       gqa_scale_bytes(config, config->v_scale_batch_stride, config->v_scale_head_stride), 4},
  };
  memcpy(tensors, found, sizeof found);
}

static gqa_status check_softcap(GQADecodeConfig const* config) {
  double const most = gqa_config_limits.max_softcap;
  double const cap = (double)config->softcap, scale = fabs((double)config->scale);
  double const least = scale / most > (double)FLT_MIN ? scale / most : (double)FLT_MIN;
  if (!(cap >= 0 && cap <= most)) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: softcap: got %g; allowed: 0 (none), or a number up to %g. Nothing was "
                    "launched.",
                    cap, most);
  }
  if (cap != 0 && cap < least) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: softcap: got %g; allowed: 0 (none), or %.3g and more with this scale. "
                    "Nothing was launched.",
                    cap, least);
  }
  return GQA_SUCCESS;
}

gqa_status gqa_check_flag(char const* field, int32_t value) {
  return value == 0 || value == 1 ? GQA_SUCCESS : gqa_fail_range(field, value, 0, 1);
}

gqa_status gqa_check_number(char const* field, int32_t dtype) {
  if (dtype >= GQA_FLOAT16 && dtype <= GQA_FLOAT32) return GQA_SUCCESS;
  return gqa_fail(
      GQA_ERROR_INVALID_VALUE,
      "config: %s: got %d; allowed: GQA_FLOAT16 (0), GQA_BFLOAT16 (1), GQA_FLOAT32 (2). "
      "Nothing was launched.",
      field, dtype);
}

static gqa_status check_types_and_strides(GQADecodeConfig const* config) {
  int32_t const stride = config->alibi_batch_stride;
  gqa_status const status = gqa_check_number("sinks_type", config->sinks_type);
  if (status != GQA_SUCCESS) return status;
  if (stride != 0 && stride != config->num_q_heads) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: alibi_batch_stride: got %d; allowed: 0 (the same slopes for all "
                    "sequences), or num_q_heads, %d. Nothing was launched.",
                    stride, config->num_q_heads);
  }
  if (config->cache_rows < 0) return gqa_fail_range("cache_rows", config->cache_rows, 0, INT32_MAX);
  if (config->cache_batch_idx == NULL && gqa_cache_rows(config) != config->batch_size) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: cache_rows: got %d without cache_batch_idx; allowed: 0, or "
                    "batch_size, %d. Nothing was launched.",
                    config->cache_rows, config->batch_size);
  }
  return GQA_SUCCESS;
}

gqa_status gqa_check_features(GQADecodeConfig const* config) {
  gqa_memory tensors[kGqaFeatureTensors];
  gqa_status status = check_softcap(config);
  if (status == GQA_SUCCESS && config->window < 0) {
    status = gqa_fail_range("window", config->window, 0, INT32_MAX);
  }
  if (status == GQA_SUCCESS) status = check_types_and_strides(config);
  if (status == GQA_SUCCESS) status = gqa_check_tokens(config);
  if (status == GQA_SUCCESS) status = gqa_check_turning(config);
  if (status == GQA_SUCCESS) status = gqa_check_stored(config);
  if (status == GQA_SUCCESS) status = gqa_check_flag("equal_lengths", config->equal_lengths);
  if (status == GQA_SUCCESS) status = gqa_check_flag("dependent", config->dependent);
  if (status == GQA_SUCCESS) status = gqa_check_flag("output_float32", config->output_float32);
  if (status != GQA_SUCCESS || gqa_features_of(config) == 0) return status;
  gqa_feature_tensors(config, tensors);
  for (int i = 0; i < kGqaFeatureTensors; ++i) {
    if ((uintptr_t)tensors[i].address % (uintptr_t)tensors[i].alignment != 0) {
      return gqa_fail(GQA_ERROR_INVALID_VALUE,
                      "config: %s: got address %p; allowed: multiples of %d. Nothing was launched.",
                      tensors[i].name, tensors[i].address, tensors[i].alignment);
    }
  }
  return GQA_SUCCESS;
}

int32_t gqa_number_of(int32_t dtype) {
  if (dtype == GQA_FLOAT32) return kGqaNumberFloat32;
  return dtype == GQA_FLOAT16 ? kGqaNumberFloat16 : kGqaNumberBfloat16;
}

void gqa_bind_features(GQADecodeConfig const* config, gqa_params* params) {
  int32_t const longest = gqa_config_limits.max_seq_len;
  if (gqa_features_of(config) == 0) return;
  params->window_left = config->window > longest ? longest : config->window - 1;
  if (config->softcap != 0) {
    params->softcap_in = (float)((double)config->scale / (double)config->softcap);
    params->softcap_out = (float)((double)config->softcap * kLog2E);
  }
  if (config->sinks != NULL) {
    params->sinks = config->sinks;
    params->sinks_type = gqa_number_of(config->sinks_type);
  }
  if (config->alibi_slopes != NULL) {
    params->alibi_slopes = config->alibi_slopes;
    params->alibi_batch_stride = config->alibi_batch_stride;
  }
  params->cache_leftpad = config->cache_leftpad;
  params->cache_batch_idx = config->cache_batch_idx;
  params->cache_rows = (int32_t)gqa_cache_rows(config);
  gqa_bind_pages(config, params);
  gqa_bind_turning(config, params);
  gqa_bind_stored(config, params);
}
