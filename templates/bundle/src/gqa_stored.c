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
  int const of_tokens = config->scales_of_tokens != 0;
  if (config->cache_type == GQA_FLOAT8_E4M3FN) {
    return of_tokens ? kGqaE4m3OfTokens : kGqaE4m3Operands;
  }
  if (config->cache_type != GQA_FLOAT8_E5M2) return 0;
  return of_tokens ? kGqaE5m2OfTokens : kGqaE5m2Operands;
}

int32_t gqa_cache_element_bytes(GQADecodeConfig const* config) {
  return gqa_stored_as(config) == 0 ? kElementBytes : 1;
}

int32_t gqa_packed(int32_t features) { return (features & kGqaStored) == 0 ? 1 : 2; }

char const* gqa_name_stored(int32_t features) {
  int32_t const stored = features & kGqaStored;
  if (stored == kGqaE4m3Operands) return " and caches of float8_e4m3fn";
  if (stored == kGqaE5m2Operands) return " and caches of float8_e5m2";
  if (stored == kGqaE4m3OfTokens) return " and caches of float8_e4m3fn with scales of tokens";
  return stored == kGqaE5m2OfTokens ? " and caches of float8_e5m2 with scales of tokens" : "";
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

// Scales of a sequence's tokens, or of a page's.
static int64_t scales_of_row(GQADecodeConfig const* config) {
  return (int64_t)gqa_pool_tokens(config) * config->num_kv_heads;
}

// From those to the next row's.
static int64_t row_stride(GQADecodeConfig const* config, scale const* given) {
  return given->batch_stride == 0 ? scales_of_row(config) : given->batch_stride;
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

// Bytes from the first scale to the end of the last, in floating point: sums may be of any size.
static gqa_status check_reach(GQADecodeConfig const* config, scale const* given) {
  int const of_tokens = config->scales_of_tokens;
  double const rows = (double)(of_tokens ? gqa_pool_rows(config) : config->batch_size) - 1;
  double const row = (double)(of_tokens ? row_stride(config, given) : given->batch_stride);
  double const in_row = of_tokens ? (double)scales_of_row(config)
                                  : (config->num_kv_heads - 1.0) * given->head_stride + 1;
  double const bytes = (rows * row + in_row) * (double)sizeof(float);
  if (given->address == NULL || bytes <= kMaxBytes) return GQA_SUCCESS;
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: %ss: got %.4g bytes from the first scale to the last; allowed: up to "
                  "%.4g. Nothing was launched.",
                  given->field, bytes, kMaxBytes);
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

// Rows of tokens do not share memory, and their heads are neighbours.
static gqa_status check_rows(GQADecodeConfig const* config, scale const* given) {
  int64_t const least = scales_of_row(config), stride = row_stride(config, given);
  if (given->head_stride > 1) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: %s_head_stride: got %d with scales_of_tokens; allowed: 0 or 1. "
                    "Nothing was launched. A token's scales are neighbours.",
                    given->field, given->head_stride);
  }
  if (gqa_pool_rows(config) == 1 || (stride >= least && stride <= INT32_MAX)) return GQA_SUCCESS;
  return gqa_fail(
      GQA_ERROR_INVALID_VALUE,
      "config: %s_batch_stride: got %lld with scales_of_tokens; allowed: from %lld, the "
      "scales of all tokens of a sequence or page, to %d, and 0 for packed ones. "
      "Nothing was launched.",
      given->field, (long long)stride, (long long)least, INT32_MAX);
}

// Scales of tokens come both or not at all.
static gqa_status check_of_tokens(GQADecodeConfig const* config, scale const* given) {
  if (given->address == NULL) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: %ss: got null with scales_of_tokens; needed: scales on the device. "
                    "Nothing was launched. Keys and values both have a scale for every token, or "
                    "none.",
                    given->field);
  }
  if ((uintptr_t)given->address % sizeof(float) != 0) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: %ss: got address %p; allowed: multiples of %d. Nothing was launched.",
                    given->field, (void const*)given->address, (int)sizeof(float));
  }
  return check_rows(config, given);
}

gqa_status gqa_check_stored(GQADecodeConfig const* config) {
  scale const scales[] = {scale_of_keys(config), scale_of_values(config)};
  int const of_tokens = config->scales_of_tokens, unscaled = gqa_stored_as(config) == 0;
  gqa_status status = check_type(config);
  if (status == GQA_SUCCESS) status = gqa_check_flag("scales_of_tokens", of_tokens);
  if (status == GQA_SUCCESS && unscaled && of_tokens) {
    status = gqa_fail(GQA_ERROR_INVALID_VALUE,
                      "config: scales_of_tokens: got 1 with caches of the type of q; allowed: 0. "
                      "Nothing was launched. Set cache_type, or leave the field zero.");
  }
  for (int i = 0; status == GQA_SUCCESS && i < 2; ++i) {
    status = unscaled ? check_unscaled(&scales[i]) : check_scale(&scales[i]);
    if (status == GQA_SUCCESS && of_tokens) status = check_of_tokens(config, &scales[i]);
    if (status == GQA_SUCCESS) status = check_reach(config, &scales[i]);
  }
  return status;
}

gqa_status gqa_check_aligned(gqa_problem const* problem) {
  if ((problem->features & kGqaOfTokens) == 0 || problem->vec_width > 1) return GQA_SUCCESS;
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: scales_of_tokens: got 1 with narrow rows; allowed: tensors whose rows "
                  "are at multiples of %d bytes. Nothing was launched. Align them, or have scales "
                  "of KV heads, or of sequences and KV heads.",
                  2 * kElementBytes);
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

// From a sequence's scales, or a page's, to the next ones', and from a KV head's to the next one's,
// as the kernels have it; those of tokens have the latter themselves.
static void steps_of(GQADecodeConfig const* config, scale const* given, int32_t* batch,
                     int32_t* head) {
  int64_t const stride = row_stride(config, given);
  if (given->address == NULL) return;
  if (config->scales_of_tokens) {
    *batch = gqa_pool_rows(config) > 1 ? (int32_t)stride : 0;
    return;
  }
  *batch = config->batch_size > 1 ? given->batch_stride : 0;
  *head = config->num_kv_heads > 1 ? given->head_stride : 0;
}

void gqa_bind_stored(GQADecodeConfig const* config, gqa_params* params) {
  scale const keys = scale_of_keys(config), values = scale_of_values(config);
  if (gqa_stored_as(config) == 0) return;
  params->k_scale = keys.number == 0 ? 1.0f : keys.number;
  params->v_scale = values.number == 0 ? 1.0f : values.number;
  params->k_scales = keys.address;
  params->v_scales = values.address;
  steps_of(config, &keys, &params->k_scale_batch, &params->k_scale_head);
  steps_of(config, &values, &params->v_scale_batch, &params->v_scale_head);
}
