// Caches whose elements are of 8 bits, and the scales by which they count: what configurations may
// say of them, and what the kernels are told.
#include <stdio.h>

#include "gqa_internal.h"
#include "gqa_kernels.h"
#include "gqa_params.h"

// What is said of keys, or of values.
typedef struct scale {
  char const* field;  // of the number; the others begin with it
  float number;
  float const* address;
  int32_t batch_stride;
  int32_t head_stride;
} scale;

static scale scale_of_keys(GQADecodeConfig const* c) {
  scale const keys = {"k_scale", c->k_scale, c->k_scales, c->k_scale_batch_stride,
                      c->k_scale_head_stride};
  return keys;
}

static scale scale_of_values(GQADecodeConfig const* c) {
  scale const values = {"v_scale", c->v_scale, c->v_scales, c->v_scale_batch_stride,
                        c->v_scale_head_stride};
  return values;
}

int32_t gqa_stored_as(GQADecodeConfig const* config) {
  if (config->cache_type == GQA_FLOAT8_E4M3FN) return kGqaE4m3Operands;
  return config->cache_type == GQA_FLOAT8_E5M2 ? kGqaE5m2Operands : 0;
}

int32_t gqa_cache_element_bytes(GQADecodeConfig const* config) {
  return gqa_stored_as(config) == 0 ? kElementBytes : 1;
}

int32_t gqa_packed(int32_t features) { return (features & kGqaStored) == 0 ? 1 : 2; }

char const* gqa_name_stored(int32_t features) {
  if ((features & kGqaE4m3Operands) != 0) return " and caches of float8_e4m3fn";
  return (features & kGqaE5m2Operands) != 0 ? " and caches of float8_e5m2" : "";
}

int64_t gqa_scale_bytes(GQADecodeConfig const* config, int32_t batch_stride, int32_t head_stride) {
  int64_t const last = (int64_t)(config->batch_size - 1) * batch_stride +
                       (int64_t)(config->num_kv_heads - 1) * head_stride;
  return (last + 1) * (int64_t)sizeof(float);
}

static gqa_status check_type(GQADecodeConfig const* config) {
  int32_t const type = config->cache_type;
  if (type == 0 || type == config->dtype || gqa_stored_as(config) != 0) return GQA_SUCCESS;
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: cache_type: got %d; allowed: 0 or dtype, %d (caches of the type of q), "
                  "GQA_FLOAT8_E4M3FN (3), GQA_FLOAT8_E5M2 (4). Nothing was launched.",
                  type, config->dtype);
}

// Caches of 16 bits have none.
static gqa_status check_unscaled(scale const* given) {
  if (given->number == 0 && given->address == NULL) return GQA_SUCCESS;
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: %s%s: got one with caches of the type of q; allowed: %s. Nothing was "
                  "launched. Set cache_type, or leave the field zero.",
                  given->field, given->address == NULL ? "" : "s",
                  given->address == NULL ? "0" : "null");
}

static gqa_status check_stride(char const* field, char const* dim, int32_t stride) {
  char name[32];
  if (stride >= 0) return GQA_SUCCESS;
  snprintf(name, sizeof name, "%s_%s_stride", field, dim);
  return gqa_fail_range(name, stride, 0, INT32_MAX);
}

static gqa_status check_scale(scale const* given) {
  gqa_limits const* limits = &gqa_config_limits;
  float const number = given->number;
  if (number != 0 && given->address != NULL) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: %s: got %g with %ss; allowed: one of the two. Nothing was launched.",
                    given->field, (double)number, given->field);
  }
  if (number != 0 && !(number >= limits->min_cache_scale && number <= limits->max_cache_scale)) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: %s: got %g; allowed: 0 (one), or a number from %g to %g. Nothing was "
                    "launched.",
                    given->field, (double)number, (double)limits->min_cache_scale,
                    (double)limits->max_cache_scale);
  }
  gqa_status const status = check_stride(given->field, "batch", given->batch_stride);
  if (status != GQA_SUCCESS) return status;
  return check_stride(given->field, "head", given->head_stride);
}

gqa_status gqa_check_stored(GQADecodeConfig const* config) {
  scale const scales[] = {scale_of_keys(config), scale_of_values(config)};
  gqa_status status = check_type(config);
  for (int i = 0; status == GQA_SUCCESS && i < 2; ++i) {
    status = gqa_stored_as(config) == 0 ? check_unscaled(&scales[i]) : check_scale(&scales[i]);
  }
  return status;
}

gqa_status gqa_check_pairs(gqa_view const* cache) {
  uintptr_t bits = cache->address;
  if (cache->element_bytes >= kElementBytes) return GQA_SUCCESS;
  for (int dim = 0; dim < kGqaElement; ++dim) {
    if (cache->sizes[dim] > 1) bits |= (uintptr_t)cache->strides[dim];
  }
  if (bits % kElementBytes == 0) return GQA_SUCCESS;
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "%s: got strides %lld, %lld, %lld at address %p; allowed: rows at multiples of "
                  "%d bytes, even strides of elements of 8 bits. Nothing was launched.",
                  cache->name, (long long)cache->strides[kGqaBatch],
                  (long long)cache->strides[kGqaToken], (long long)cache->strides[kGqaHead],
                  (void*)cache->address, kElementBytes);
}

gqa_view gqa_in_pairs(gqa_view const* cache) {
  gqa_view pairs = *cache;
  int32_t const packed = kElementBytes / cache->element_bytes;
  pairs.element_bytes = kElementBytes;
  pairs.sizes[kGqaElement] /= packed;
  for (int dim = 0; dim < kGqaElement; ++dim) pairs.strides[dim] /= packed;
  return pairs;
}

void gqa_bind_stored(GQADecodeConfig const* config, gqa_params* params) {
  int const sequences = config->batch_size > 1, heads = config->num_kv_heads > 1;
  if (gqa_stored_as(config) == 0) return;
  params->k_scale = config->k_scale == 0 ? 1.0f : config->k_scale;
  params->v_scale = config->v_scale == 0 ? 1.0f : config->v_scale;
  params->k_scales = config->k_scales;
  params->v_scales = config->v_scales;
  if (config->k_scales != NULL) {
    params->k_scale_batch = sequences ? config->k_scale_batch_stride : 0;
    params->k_scale_head = heads ? config->k_scale_head_stride : 0;
  }
  if (config->v_scales != NULL) {
    params->v_scale_batch = sequences ? config->v_scale_batch_stride : 0;
    params->v_scale_head = heads ? config->v_scale_head_stride : 0;
  }
}
