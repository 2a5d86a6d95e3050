// Several tokens of a sequence: what configurations may say of them, and what the kernels are told.
#include "gqa_internal.h"
#include "gqa_kernels.h"
#include "gqa_params.h"

enum { kWordBits = 32 };  // of a mask of drafts

int32_t gqa_query_tokens(GQADecodeConfig const* config) {
  int32_t const given = config->num_tokens;
  if (config->cu_seqlens_q == NULL) return given == 0 ? 1 : given;
  return given == 0 || given > config->total_tokens ? config->total_tokens : given;
}

int32_t gqa_new_tokens(GQADecodeConfig const* config) {
  if (config->cu_seqlens_k_new != NULL) return 0;
  return config->num_new_tokens == 0 ? gqa_query_tokens(config) : config->num_new_tokens;
}

int64_t gqa_all_query_tokens(GQADecodeConfig const* config) {
  if (config->cu_seqlens_q != NULL) return config->total_tokens;
  return (int64_t)config->batch_size * gqa_query_tokens(config);
}

int64_t gqa_all_new_tokens(GQADecodeConfig const* config) {
  if (config->cu_seqlens_k_new != NULL) return config->total_new_tokens;
  return (int64_t)config->batch_size * gqa_new_tokens(config);
}

int64_t gqa_tree_bytes(GQADecodeConfig const* config) {
  int64_t const words = (gqa_query_tokens(config) + kWordBits - 1) / kWordBits;
  return gqa_all_query_tokens(config) * words * (int64_t)sizeof(uint32_t);
}

int gqa_several_tokens(GQADecodeConfig const* config) {
  return gqa_query_tokens(config) > 1 || gqa_new_tokens(config) > 1 ||
         config->cu_seqlens_q != NULL || config->cu_seqlens_k_new != NULL;
}

// Sequences with unlike numbers of tokens, on one side: of queries and output, or of k and v.
typedef struct side {
  char const* index;  // where each begins
  int32_t const* ends;
  char const* field;
  int32_t total;
  char const* stride_fields[2];
  int64_t strides[2];  // between sequences, which lie where the index says
} side;

static gqa_status check_side(side const* given) {
  if (given->ends == NULL) {
    if (given->total == 0) return GQA_SUCCESS;
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: %s: got %d without %s; allowed: 0. Nothing was launched. Pass the "
                    "index that says where each sequence begins.",
                    given->field, given->total, given->index);
  }
  if (given->total < 1) return gqa_fail_range(given->field, given->total, 1, INT32_MAX);
  for (int i = 0; i < 2; ++i) {
    if (given->strides[i] == 0) continue;
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: %s: got %lld with %s; allowed: 0. Nothing was launched. The index "
                    "says where sequences begin; leave the stride zero.",
                    given->stride_fields[i], (long long)given->strides[i], given->index);
  }
  return GQA_SUCCESS;
}

static gqa_status check_indices(GQADecodeConfig const* c) {
  side const queries = {
      "cu_seqlens_q",
      c->cu_seqlens_q,
      "total_tokens",
      c->total_tokens,
      {"output_batch_stride", "q_batch_stride"},
      {c->output_batch_stride, c->q_batch_stride},
  };
  side const appended = {
      "cu_seqlens_k_new",
      c->cu_seqlens_k_new,
      "total_new_tokens",
      c->total_new_tokens,
      {"k_batch_stride", "v_batch_stride"},
      {c->k_batch_stride, c->v_batch_stride},
  };
  gqa_status const status = check_side(&queries);
  return status == GQA_SUCCESS ? check_side(&appended) : status;
}

// How many there are.
static gqa_status check_counts(GQADecodeConfig const* config) {
  int32_t const most = gqa_config_limits.max_tokens, given = config->num_tokens;
  int32_t const queries = gqa_query_tokens(config), appended = config->num_new_tokens;
  int const is_ragged = config->cu_seqlens_q != NULL;
  if (given < 0 || queries > most) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: num_tokens: got %d%s; allowed: 1 to %d per sequence, and 0 for %s. "
                    "Nothing was launched. Use other kernels for long prompts.",
                    given, is_ragged ? " with cu_seqlens_q" : "", most,
                    is_ragged ? "total_tokens, if they are no more" : "one");
  }
  if (config->cu_seqlens_k_new != NULL) {
    if (appended == 0) return GQA_SUCCESS;
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: num_new_tokens: got %d with cu_seqlens_k_new; allowed: 0. Nothing was "
                    "launched. The index says how many there are.",
                    appended);
  }
  if (is_ragged && appended == 0) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: num_new_tokens: got 0 with cu_seqlens_q; allowed: 1 to %d, or "
                    "cu_seqlens_k_new. Nothing was launched.",
                    most);
  }
  if (appended < 0 || appended > most) {
    return gqa_fail_range("num_new_tokens", appended, 0, most);
  }
  if (gqa_new_tokens(config) > config->max_seq_len) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: num_new_tokens: got %d; allowed: at most max_seq_len, %d. Nothing was "
                    "launched.",
                    gqa_new_tokens(config), config->max_seq_len);
  }
  return GQA_SUCCESS;
}

// A mask of drafts is of as many in every sequence, all of which are new.
static gqa_status check_tree(GQADecodeConfig const* config) {
  int32_t const queries = gqa_query_tokens(config), appended = gqa_new_tokens(config);
  if (config->tree_mask == NULL) return GQA_SUCCESS;
  if (config->cu_seqlens_q != NULL || config->cu_seqlens_k_new != NULL) {
    return gqa_fail(
        GQA_ERROR_INVALID_VALUE,
        "config: tree_mask: got one with %s; allowed: as many drafts in every sequence. "
        "Nothing was launched.",
        config->cu_seqlens_q != NULL ? "cu_seqlens_q" : "cu_seqlens_k_new");
  }
  if (queries == appended) return GQA_SUCCESS;
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: tree_mask: got one with %d queries and %d new tokens; allowed: as many "
                  "of both. Nothing was launched.",
                  queries, appended);
}

// The rows that they have.
static gqa_status check_bytes(GQADecodeConfig const* config) {
  int64_t const queries = gqa_all_query_tokens(config), appended = gqa_all_new_tokens(config);
  int32_t const value_dim = gqa_value_dim(config);
  double const dim = config->head_dim > value_dim ? config->head_dim : value_dim;
  double const rows = (double)(queries > appended ? queries : appended) * config->num_q_heads;
  double const bytes = rows * dim * (double)sizeof(float);
  if (!gqa_several_tokens(config) || bytes <= kMaxBytes) return GQA_SUCCESS;
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: sizes: got tokens of %.4g bytes; allowed: up to %.4g. Nothing was "
                  "launched.",
                  bytes, kMaxBytes);
}

gqa_status gqa_check_tokens(GQADecodeConfig const* config) {
  gqa_status status = gqa_check_flag("not_causal", config->not_causal);
  if (status == GQA_SUCCESS && config->window_right < 0) {
    status = gqa_fail_range("window_right", config->window_right, 0, INT32_MAX);
  }
  if (status == GQA_SUCCESS && config->window_right != 0 && !config->not_causal) {
    status = gqa_fail(GQA_ERROR_INVALID_VALUE,
                      "config: window_right: got %d without not_causal; allowed: 0. Nothing was "
                      "launched. Causal queries see nothing behind their own tokens.",
                      config->window_right);
  }
  if (status == GQA_SUCCESS) status = check_indices(config);
  if (status == GQA_SUCCESS) status = check_counts(config);
  if (status == GQA_SUCCESS) status = check_tree(config);
  return status == GQA_SUCCESS ? check_bytes(config) : status;
}

static int32_t window_right(GQADecodeConfig const* config) {
  if (!config->not_causal) return 0;
  return config->window_right == 0 ? gqa_config_limits.max_seq_len : config->window_right - 1;
}

void gqa_bind_tokens(GQADecodeConfig const* config, gqa_tensors const* t, gqa_params* params) {
  gqa_view const* views = t->views;
  int const is_ragged = config->cu_seqlens_q != NULL;
  int32_t const queries = gqa_query_tokens(config);
  int64_t const all = gqa_all_query_tokens(config);
  if (!gqa_several_tokens(config) && config->tree_mask == NULL) return;
  params->num_query_tokens = queries;
  params->all_query_tokens = (int32_t)all;
  params->num_new_tokens = params->new_token_step = gqa_new_tokens(config);
  params->all_new_tokens = (int32_t)gqa_all_new_tokens(config);
  params->window_right = window_right(config);
  params->q_token_stride = views[kGqaQ].strides[kGqaToken];
  params->out_token_stride = views[kGqaOutput].strides[kGqaToken];
  params->k_new_token_stride = views[kGqaK].strides[kGqaToken];
  params->v_new_token_stride = views[kGqaV].strides[kGqaToken];
  params->lse_batch_stride = is_ragged ? 0 : (int64_t)config->num_q_heads * queries;
  params->lse_head_stride = is_ragged ? all : queries;
  params->tree_mask = config->tree_mask;
  params->cu_seqlens_q = config->cu_seqlens_q;
  params->cu_seqlens_k_new = config->cu_seqlens_k_new;
  if (is_ragged) params->q_stride.batch = params->out_stride.batch = 0;
  if (config->cu_seqlens_k_new != NULL) {
    params->k_new_stride.batch = params->v_new_stride.batch = 0;
  }
}
