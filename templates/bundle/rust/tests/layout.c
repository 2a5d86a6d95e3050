// What layout.rs compares with the crate's bindings.
#include <stddef.h>

#include "gqa_attention_decode.h"

typedef struct gqa_fact {
  char const* name;
  long long value;
} gqa_fact;

#define TYPE(type) \
  {#type " size", sizeof(type)}, { #type " alignment", _Alignof(type) }
#define FIELD(type, field) {#type "." #field, offsetof(type, field)}
#define CONSTANT(constant) {#constant, constant}

gqa_fact const gqa_facts[] = {
    TYPE(GQADecodeConfig),
    FIELD(GQADecodeConfig, batch_size),
    FIELD(GQADecodeConfig, cache_len),
    FIELD(GQADecodeConfig, num_q_heads),
    FIELD(GQADecodeConfig, num_kv_heads),
    FIELD(GQADecodeConfig, head_dim),
    FIELD(GQADecodeConfig, scale),
    FIELD(GQADecodeConfig, max_seq_len),
    FIELD(GQADecodeConfig, dtype),
    FIELD(GQADecodeConfig, workspace),
    FIELD(GQADecodeConfig, workspace_size),
    TYPE(gqa_launch),
    FIELD(gqa_launch, kernel),
    FIELD(gqa_launch, grid),
    FIELD(gqa_launch, cluster),
    FIELD(gqa_launch, block),
    FIELD(gqa_launch, shared_bytes),
    FIELD(gqa_launch, num_splits),
    FIELD(gqa_launch, num_stages),
    FIELD(gqa_launch, workspace_size),
    TYPE(gqa_status),
    TYPE(gqa_stream_t),
    TYPE(gqa_log_callback),
    CONSTANT(GQA_SUCCESS),
    CONSTANT(GQA_ERROR_NULL_POINTER),
    CONSTANT(GQA_ERROR_INVALID_VALUE),
    CONSTANT(GQA_ERROR_CACHE_OVERFLOW),
    CONSTANT(GQA_ERROR_UNSUPPORTED),
    CONSTANT(GQA_ERROR_WORKSPACE),
    CONSTANT(GQA_ERROR_NO_DRIVER),
    CONSTANT(GQA_ERROR_DEVICE),
    CONSTANT(GQA_ERROR_LAUNCH),
    CONSTANT(GQA_FLOAT16),
    CONSTANT(GQA_BFLOAT16),
};
size_t const gqa_num_facts = sizeof gqa_facts / sizeof gqa_facts[0];
