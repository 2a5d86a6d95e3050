// Caches in pages: what configurations may say of them, and what the kernels are told.
#include "gqa_internal.h"
#include "gqa_kernels.h"
#include "gqa_params.h"

// What there is none of without a table.
static gqa_status check_unpaged(GQADecodeConfig const* config) {
  struct {
    char const* field;
    int64_t value;
  } const numbers[] = {
      {"page_size", config->page_size},
      {"max_pages", config->max_pages},
      {"num_pages", config->num_pages},
      {"block_table_stride", config->block_table_stride},
  };
  for (int i = 0; i < (int)(sizeof numbers / sizeof numbers[0]); ++i) {
    if (numbers[i].value == 0) continue;
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: %s: got %lld without block_table; allowed: 0. Nothing was launched. "
                    "Pass the table, or leave all fields of pages zero.",
                    numbers[i].field, (long long)numbers[i].value);
  }
  if (config->slot_mapping == NULL) return GQA_SUCCESS;
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: slot_mapping: got %p without block_table; allowed: null. Nothing was "
                  "launched. Pass the table that says where the other tokens are.",
                  (void const*)config->slot_mapping);
}

static int64_t table_stride(GQADecodeConfig const* config) {
  return config->block_table_stride == 0 ? config->max_pages : config->block_table_stride;
}

static gqa_status check_table(GQADecodeConfig const* config) {
  double const rows = (double)gqa_cache_rows(config), size = (double)sizeof(int32_t);
  int64_t const stride = table_stride(config);
  double const bytes = ((rows - 1) * (double)stride + config->max_pages) * size;
  if (stride < 0) {
    return gqa_fail_range("block_table_stride", stride, 0, (long long)(kMaxBytes / size));
  }
  if (bytes <= kMaxBytes) return GQA_SUCCESS;
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: block_table: got %.4g bytes from its first entry to its last; allowed: "
                  "up to %.4g. Nothing was launched.",
                  bytes, kMaxBytes);
}

gqa_status gqa_settle_pages(GQADecodeConfig* config) {
  int32_t const longest = gqa_config_limits.max_seq_len;
  int64_t const tokens = (int64_t)config->max_pages * config->page_size;
  if (config->block_table == NULL) return check_unpaged(config);
  if (config->page_size < 1) return gqa_fail_range("page_size", config->page_size, 1, longest);
  if (config->num_pages < 1) return gqa_fail_range("num_pages", config->num_pages, 1, INT32_MAX);
  if (config->max_pages < 1 || tokens > longest) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: max_pages: got %d pages per sequence, of %d tokens; allowed: 1 to %d "
                    "tokens per sequence. Nothing was launched. Pass the columns that are in use.",
                    config->max_pages, config->page_size, longest);
  }
  if (config->max_seq_len != 0 && config->max_seq_len != tokens) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: max_seq_len: got %d with block_table; allowed: 0, or max_pages * "
                    "page_size, %lld. Nothing was launched.",
                    config->max_seq_len, (long long)tokens);
  }
  config->max_seq_len = (int32_t)tokens;
  return check_table(config);
}

int64_t gqa_pool_rows(GQADecodeConfig const* config) {
  return config->block_table == NULL ? gqa_cache_rows(config) : config->num_pages;
}

int32_t gqa_pool_tokens(GQADecodeConfig const* config) {
  return config->block_table == NULL ? config->max_seq_len : config->page_size;
}

int64_t gqa_table_bytes(GQADecodeConfig const* config) {
  int64_t const last = (gqa_cache_rows(config) - 1) * table_stride(config);
  return (last + config->max_pages) * (int64_t)sizeof(int32_t);
}

void gqa_bind_pages(GQADecodeConfig const* config, gqa_params* params) {
  uint64_t const size = (uint64_t)config->page_size;
  int32_t shift = 31;
  if (config->block_table == NULL) return;
  while (((uint64_t)1 << (shift - 31)) < size) ++shift;
  params->num_pages = config->num_pages;
  params->block_table = config->block_table;
  params->block_table_stride = table_stride(config);
  params->slot_mapping = config->slot_mapping;
  params->page_size = config->page_size;
  // The kernels multiply by this number, and shift, to divide a token's by the size of a page.
  params->page_magic = (uint32_t)((((uint64_t)1 << shift) + size - 1) / size);
  params->page_shift = shift;
}
