// What is done to queries and new keys before they are multiplied, a norm and then a rotation: what
// configurations may say of it, and what the kernels are told.
#include <math.h>

#include "gqa_internal.h"
#include "gqa_kernels.h"
#include "gqa_params.h"

enum { kRotaryStep = 16 };  // rotary dims come in so many

static int32_t rotary_dim(GQADecodeConfig const* config) {
  return config->rotary_dim == 0 ? config->head_dim : config->rotary_dim;
}

static int64_t stride_or_packed(GQADecodeConfig const* config, int64_t stride) {
  return stride == 0 ? rotary_dim(config) / 2 : stride;
}

int32_t gqa_number_bytes(int32_t dtype) { return dtype == GQA_FLOAT32 ? 4 : kElementBytes; }

int64_t gqa_rotary_bytes(GQADecodeConfig const* config, int64_t stride) {
  int64_t const last = (config->rotary_positions - 1) * stride_or_packed(config, stride);
  return (last + rotary_dim(config) / 2) * gqa_number_bytes(config->rotary_type);
}

int64_t gqa_longest_to_turn(GQADecodeConfig const* config) {
  int32_t const queries = gqa_query_tokens(config), appended = gqa_new_tokens(config);
  if (config->rotary_cos == NULL || config->rotary_seqlens != NULL) return INT32_MAX;
  return (int64_t)config->rotary_positions - (queries > appended ? queries : appended);
}

// Tables come both or not at all.
static gqa_status check_presence(GQADecodeConfig const* config) {
  int const has_sin = config->rotary_sin != NULL, has_starts = config->rotary_seqlens != NULL;
  if (config->rotary_cos != NULL && !has_sin) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: rotary_sin: got null with rotary_cos; allowed: both or neither. "
                    "Nothing was launched.");
  }
  if (config->rotary_cos == NULL && (has_sin || has_starts)) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: %s: got %p without rotary_cos; allowed: null. Nothing was launched. "
                    "Pass rotary_cos and rotary_sin.",
                    has_sin ? "rotary_sin" : "rotary_seqlens",
                    has_sin ? config->rotary_sin : (void const*)config->rotary_seqlens);
  }
  return GQA_SUCCESS;
}

static gqa_status check_rotary_stride(GQADecodeConfig const* config, char const* field,
                                      int64_t stride) {
  double const rows = (double)config->rotary_positions * (double)stride;
  double const size = gqa_number_bytes(config->rotary_type);
  if (stride >= 0 && stride % 2 == 0 && rows * size <= kMaxBytes) return GQA_SUCCESS;
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: %s: got %lld; allowed: multiples of 2, of tables of up to %.4g bytes, "
                  "and 0 for contiguous rows. Nothing was launched.",
                  field, (long long)stride, kMaxBytes);
}

static gqa_status check_rotary(GQADecodeConfig const* config) {
  int32_t const dim = rotary_dim(config), type = config->rotary_type;
  gqa_status status = check_presence(config);
  if (status == GQA_SUCCESS) {
    status = gqa_check_flag("rotary_interleaved", config->rotary_interleaved);
  }
  if (status != GQA_SUCCESS || config->rotary_cos == NULL) return status;
  if (config->rotary_positions < 1) {
    return gqa_fail_range("rotary_positions", config->rotary_positions, 1, INT32_MAX);
  }
  if (dim < kRotaryStep || dim % kRotaryStep != 0 || dim > config->head_dim) {
    return gqa_fail(
        GQA_ERROR_INVALID_VALUE,
        "config: rotary_dim: got %d; allowed: multiples of %d up to head_dim, %d, and 0 "
        "for head_dim, if it is one. Nothing was launched.",
        config->rotary_dim, kRotaryStep, config->head_dim);
  }
  if (type != config->dtype && type != GQA_FLOAT32) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: rotary_type: got %d; allowed: dtype, %d, or GQA_FLOAT32 (2). Nothing "
                    "was launched.",
                    type, config->dtype);
  }
  status = check_rotary_stride(config, "rotary_cos_stride", config->rotary_cos_stride);
  if (status != GQA_SUCCESS) return status;
  return check_rotary_stride(config, "rotary_sin_stride", config->rotary_sin_stride);
}

static gqa_status check_norm(GQADecodeConfig const* config) {
  gqa_status status = gqa_check_flag("norm_plus_one", config->norm_plus_one);
  if (status == GQA_SUCCESS) status = gqa_check_number("q_norm_type", config->q_norm_type);
  if (status == GQA_SUCCESS) status = gqa_check_number("k_norm_type", config->k_norm_type);
  if (status != GQA_SUCCESS) return status;
  if (config->norm_eps >= 0 && isfinite(config->norm_eps)) return GQA_SUCCESS;
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: norm_eps: got %g; allowed: a finite number, 0 or more. Nothing was "
                  "launched.",
                  (double)config->norm_eps);
}

gqa_status gqa_check_turning(GQADecodeConfig const* config) {
  gqa_status const status = check_norm(config);
  return status == GQA_SUCCESS ? check_rotary(config) : status;
}

void gqa_bind_turning(GQADecodeConfig const* config, gqa_params* params) {
  int const moves = !config->not_causal || config->window != 0 || config->window_right != 0;
  if (config->q_norm_weight != NULL || config->k_norm_weight != NULL) {
    params->q_norm_weight = config->q_norm_weight;
    params->k_norm_weight = config->k_norm_weight;
    if (config->q_norm_weight != NULL) params->q_norm_type = gqa_number_of(config->q_norm_type);
    if (config->k_norm_weight != NULL) params->k_norm_type = gqa_number_of(config->k_norm_type);
    params->norm_eps = config->norm_eps;
    params->norm_offset = config->norm_plus_one ? 1.0f : 0.0f;
  }
  if (config->rotary_cos == NULL) return;
  params->rotary_cos = config->rotary_cos;
  params->rotary_sin = config->rotary_sin;
  params->rotary_seqlens = config->rotary_seqlens;
  params->rotary_cos_stride = stride_or_packed(config, config->rotary_cos_stride);
  params->rotary_sin_stride = stride_or_packed(config, config->rotary_sin_stride);
  params->rotary_type = gqa_number_of(config->rotary_type);
  params->rotary_positions = config->rotary_positions;
  params->rotary_dim = rotary_dim(config);
  params->rotary_interleaved = config->rotary_interleaved;
  params->rotary_step = moves;
}
