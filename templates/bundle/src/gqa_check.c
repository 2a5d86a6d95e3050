#include <math.h>
#include <stdio.h>
#include <string.h>

#include "gqa_internal.h"
#include "gqa_kernels.h"

enum { kAlignment = 16 };

// Whether a version of a structure may be that large; its other bytes are not read before.
static gqa_status check_size(char const* what, char const* type, char const* initial, size_t got,
                             size_t least, size_t known) {
  size_t const step = sizeof(size_t);
  if (got >= least && got <= kGqaMostStructBytes && got % step == 0) return GQA_SUCCESS;
  return gqa_fail(
      GQA_ERROR_INVALID_VALUE,
      "%s: struct_size: got %zu; allowed: sizeof(%s) of any version, %zu to %d in steps "
      "of %zu, and %zu here. Nothing was launched. Begin with %s.",
      what, got, type, least, kGqaMostStructBytes, step, known, initial);
}

// What a newer caller sets and this library does not know must not be ignored.
static gqa_status check_unknown(GQADecodeConfig const* given) {
  unsigned char const* bytes = (unsigned char const*)given;
  for (size_t i = sizeof *given; i < given->struct_size; ++i) {
    if (bytes[i] != 0) {
      return gqa_fail(
          GQA_ERROR_UNSUPPORTED_FEATURE,
          "config: got %zu bytes with %d in byte %zu; allowed: zeros beyond the %zu bytes that "
          "this "
          "library knows. Nothing was launched. The program asks for a feature that is newer than "
          "the library: leave its field zero, or export the library again with the gqa-cutlass "
          "that the program's header is from.",
          given->struct_size, (int)bytes[i], i, sizeof *given);
    }
  }
  return GQA_SUCCESS;
}

static gqa_status check_head_dim(char const* field, int32_t got) {
  gqa_limits const* limits = &gqa_config_limits;
  if (got >= limits->min_head_dim && got <= limits->max_head_dim &&
      got % limits->head_dim_step == 0) {
    return GQA_SUCCESS;
  }
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: %s: got %d; allowed: multiples of %d from %d to %d. Nothing was "
                  "launched. Pad q, k, v and the cache with zeros.",
                  field, got, limits->head_dim_step, limits->min_head_dim, limits->max_head_dim);
}

// The sizes and the scale. Where there are pages, they say how long a sequence can be.
static gqa_status check_config(GQADecodeConfig* config) {
  gqa_limits const* limits = &gqa_config_limits;
  gqa_status status = gqa_settle_pages(config);
  if (status != GQA_SUCCESS) return status;
  if (config->batch_size < 1 || config->batch_size > limits->max_batch) {
    return gqa_fail_range("batch_size", config->batch_size, 1, limits->max_batch);
  }
  if (config->max_seq_len < 1 || config->max_seq_len > limits->max_seq_len) {
    return gqa_fail_range("max_seq_len", config->max_seq_len, 1, limits->max_seq_len);
  }
  status = check_head_dim("head_dim", config->head_dim);
  if (status == GQA_SUCCESS) status = check_head_dim("head_dim_v", gqa_value_dim(config));
  if (status != GQA_SUCCESS) return status;
  if (config->num_kv_heads < 1 || config->num_q_heads < 1 ||
      config->num_q_heads % config->num_kv_heads != 0) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: heads: got %d query heads and %d KV heads; allowed: a number of query "
                    "heads that is a multiple of the number of KV heads. Nothing was launched.",
                    config->num_q_heads, config->num_kv_heads);
  }
  if (config->num_q_heads / config->num_kv_heads > limits->max_group_size) {
    return gqa_fail_range("query heads per KV head", config->num_q_heads / config->num_kv_heads, 1,
                          limits->max_group_size);
  }
  if (!(fabs((double)config->scale) <= (double)limits->max_scale)) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: scale: got %g; allowed: a number from %g to %g, usually 1 / "
                    "sqrt(head_dim). Nothing was launched.",
                    (double)config->scale, -(double)limits->max_scale, (double)limits->max_scale);
  }
  if (config->dtype != GQA_FLOAT16 && config->dtype != GQA_BFLOAT16) {
    return gqa_fail(
        GQA_ERROR_INVALID_VALUE,
        "config: dtype: got %d; allowed: GQA_FLOAT16 (0), GQA_BFLOAT16 (1). Nothing was "
        "launched.",
        config->dtype);
  }
  status = gqa_check_features(config);
  if (status != GQA_SUCCESS) return status;
  double const tokens = (double)gqa_pool_rows(config) * gqa_pool_tokens(config);
  double const rows = tokens * config->num_kv_heads;
  int32_t const value_dim = gqa_value_dim(config);
  double const bytes = rows * (config->head_dim > value_dim ? config->head_dim : value_dim) *
                       gqa_cache_element_bytes(config);
  if (bytes > kMaxBytes) {
    return gqa_fail(
        GQA_ERROR_INVALID_VALUE,
        "config: sizes: got caches of %.4g bytes; allowed: up to %.4g. Nothing was launched.",
        bytes, kMaxBytes);
  }
  status = gqa_check_strides(config);
  if (status == GQA_SUCCESS && (uintptr_t)config->lse % sizeof(float) != 0) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: lse: got address %p; allowed: multiples of %d. Nothing was launched.",
                    (void*)config->lse, (int)sizeof(float));
  }
  return status;
}

gqa_status gqa_read_config(GQADecodeConfig const* given, GQADecodeConfig* config) {
  GQADecodeConfig const defaults = GQA_DECODE_CONFIG_INIT;
  size_t const known = sizeof defaults;
  if (given == NULL) {
    return gqa_fail(GQA_ERROR_NULL_POINTER,
                    "config: got null; needed: a GQADecodeConfig. Nothing was launched.");
  }
  gqa_status status = check_size("config", "GQADecodeConfig", "GQA_DECODE_CONFIG_INIT",
                                 given->struct_size, kGqaConfigLeastBytes, known);
  if (status == GQA_SUCCESS) status = check_unknown(given);
  if (status != GQA_SUCCESS) return status;
  *config = defaults;
  memcpy(config, given, given->struct_size < known ? given->struct_size : known);
  return check_config(config);
}

gqa_status gqa_check_launch(gqa_launch const* launched) {
  return check_size("launch", "gqa_launch", "GQA_LAUNCH_INIT", launched->struct_size,
                    kGqaLaunchLeastBytes, sizeof *launched);
}

gqa_status gqa_check_length(GQADecodeConfig const* config) {
  struct {
    char const* field;
    void const* address;
    char const* fault;
  } const indices[] = {
      {"block_table", config->block_table, "an index that names no page"},
      {"cache_batch_idx", config->cache_batch_idx, "an index that names no row"},
      {"cu_seqlens_q", config->cu_seqlens_q, "an index that is out of order"},
      {"cu_seqlens_k_new", config->cu_seqlens_k_new, "an index that is out of order"},
      {"rotary_seqlens", config->rotary_seqlens, "a position that the tables do not have"},
  };
  int32_t const appended = gqa_new_tokens(config), most = config->max_seq_len - appended;
  char are[24] = "one is";
  for (int i = 0; i < (int)(sizeof indices / sizeof indices[0]); ++i) {
    if (indices[i].address == NULL) continue;
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: %s: got %p with one length for all; allowed: null, or "
                    "lengths on the device. Nothing was launched. Call "
                    "gqa_attention_decode_ragged, which is told where to report %s.",
                    indices[i].field, indices[i].address, indices[i].fault);
  }
  if (config->cache_len < 0) return gqa_fail_range("cache_len", config->cache_len, 0, most);
  if (config->cache_len > most) {
    if (appended > 1) snprintf(are, sizeof are, "%d are", appended);
    return gqa_fail(GQA_ERROR_CACHE_OVERFLOW,
                    "cache overflow: the cache holds %d tokens and %s to be appended; max_seq_len "
                    "is %d. Nothing was written. Evict tokens, or allocate a larger cache.",
                    config->cache_len, are, config->max_seq_len);
  }
  if (config->cache_len > gqa_longest_to_turn(config)) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: cache_len: got %d; allowed: at most %lld, for which rotary_cos and "
                    "rotary_sin have the positions of all tokens of the call. Nothing was "
                    "launched. Pass longer tables.",
                    config->cache_len, (long long)gqa_longest_to_turn(config));
  }
  return GQA_SUCCESS;
}

static gqa_status fail_in_cache(char const* name, char const* cache) {
  return gqa_fail(
      GQA_ERROR_INVALID_VALUE,
      "%s: got memory of %s, to which the new token is written; allowed: memory of its own. "
      "Nothing was launched.",
      name, cache);
}

static gqa_status fail_in_result(char const* result, char const* name) {
  return gqa_fail(
      GQA_ERROR_INVALID_VALUE,
      "%s: got memory that %s also uses; allowed: memory of its own. Nothing was launched.", result,
      name);
}

// What is only read lies neither in a result nor in a cache or its scales.
static gqa_status check_apart(gqa_tensors const* t, gqa_view const* read) {
  gqa_view const* results[] = {&t->views[kGqaOutput], &t->lse};
  for (int i = 0; i < 2; ++i) {
    if (gqa_overlap(results[i], read)) return fail_in_result(results[i]->name, read->name);
  }
  for (int i = kGqaKCache; i < kGqaViews; ++i) {
    if (gqa_overlap(&t->views[i], read)) return fail_in_cache(read->name, t->views[i].name);
  }
  return GQA_SUCCESS;
}

static gqa_status check_feature_tensors(GQADecodeConfig const* config, gqa_tensors const* t) {
  gqa_memory tensors[kGqaFeatureTensors];
  gqa_status status = GQA_SUCCESS;
  if (gqa_features_of(config) == 0) return GQA_SUCCESS;
  gqa_feature_tensors(config, tensors);
  for (int i = 0; status == GQA_SUCCESS && i < kGqaFeatureTensors; ++i) {
    if (tensors[i].address == NULL) continue;
    gqa_view const read = gqa_span(tensors[i].name, tensors[i].address, tensors[i].bytes);
    status = check_apart(t, &read);
  }
  return status;
}

// Results share memory with nothing, and what is appended to with nothing that is.
static gqa_status check_written(gqa_tensors const* t) {
  gqa_view const* views = t->views;
  for (int i = 0; i < kGqaViews; ++i) {
    if (i > kGqaOutput && gqa_overlap(&views[kGqaOutput], &views[i])) {
      return fail_in_result(views[kGqaOutput].name, views[i].name);
    }
    if (gqa_overlap(&t->lse, &views[i])) return fail_in_result(t->lse.name, views[i].name);
    for (int other = kGqaKCache; other < i; ++other) {
      if (gqa_overlap(&views[other], &views[i])) {
        return fail_in_result(views[i].name, views[other].name);
      }
    }
  }
  return GQA_SUCCESS;
}

gqa_status gqa_check_tensors(GQADecodeConfig const* config, gqa_tensors const* t) {
  gqa_view const* views = t->views;
  gqa_status status = GQA_SUCCESS;
  for (int i = 0; i < kGqaTensors; ++i) {
    if (views[i].address == 0) {
      return gqa_fail(GQA_ERROR_NULL_POINTER,
                      "%s: got null; needed: device memory of %lld bytes. "
                      "Nothing was launched.",
                      views[i].name, (long long)views[i].bytes);
    }
    if (views[i].address % (uintptr_t)views[i].element_bytes != 0) {
      return gqa_fail(GQA_ERROR_INVALID_VALUE,
                      "%s: got address %p; allowed: multiples of %d. Nothing "
                      "was launched.",
                      views[i].name, (void*)views[i].address, views[i].element_bytes);
    }
    status = gqa_check_pairs(&views[i]);
    if (status != GQA_SUCCESS) return status;
  }
  status = check_written(t);
  for (int i = kGqaQ; status == GQA_SUCCESS && i <= kGqaV; ++i) {
    status = check_apart(t, &views[i]);  // they are read while the new token is written
  }
  return status == GQA_SUCCESS ? check_feature_tensors(config, t) : status;
}

gqa_status gqa_check_lengths(GQADecodeConfig const* config, gqa_tensors const* t) {
  if (t->seqlens == NULL || t->overflow == NULL) {
    return gqa_fail(GQA_ERROR_NULL_POINTER,
                    "%s: got null; needed: device memory of %lld bytes. Nothing "
                    "was launched.",
                    t->seqlens == NULL ? "cache_seqlens" : "overflow",
                    t->seqlens == NULL ? 4LL * config->batch_size : 4LL);
  }
  if ((uintptr_t)t->seqlens % 4 != 0 || (uintptr_t)t->overflow % 4 != 0) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "cache_seqlens and overflow: got addresses %p and %p; "
                    "allowed: multiples of 4. Nothing was launched.",
                    (void const*)t->seqlens, (void const*)t->overflow);
  }
  gqa_view const lengths = gqa_span("cache_seqlens", t->seqlens, 4 * (int64_t)config->batch_size);
  return check_apart(t, &lengths);
}

gqa_status gqa_check_workspace(GQADecodeConfig const* config, gqa_dispatch const* chosen) {
  size_t const needed = gqa_workspace_of(chosen);
  if (needed == 0) return GQA_SUCCESS;
  if (config->workspace == NULL || config->workspace_size < needed) {
    return gqa_fail(
        GQA_ERROR_WORKSPACE,
        "workspace: got %zu bytes at %p; needed: %zu bytes of zeroed device memory. Nothing "
        "was launched. Ask gqa_workspace_size.",
        config->workspace_size, config->workspace, needed);
  }
  if ((uintptr_t)config->workspace % kAlignment != 0) {
    return gqa_fail(GQA_ERROR_WORKSPACE,
                    "workspace: got address %p; allowed: multiples of %d. Nothing "
                    "was launched.",
                    config->workspace, kAlignment);
  }
  return GQA_SUCCESS;
}
