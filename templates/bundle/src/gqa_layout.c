// Where tensors lie in memory: what their strides are, how they are aligned, which share an
// address.
#include <stdio.h>
#include <string.h>

#include "gqa_internal.h"

enum { kWidest = 8 };  // elements of 16 bits

static char const* const kDims[] = {"batch", "token", "head"};

// Strides of 0 are those of contiguous memory. They need not be checked yet.
static void set_view(gqa_view* view, char const* name, void const* address, int32_t element_bytes,
                     int64_t const sizes[kGqaDims], int64_t const given[kGqaElement]) {
  int64_t packed = sizes[kGqaElement];
  uint64_t end = (uint64_t)packed;
  view->name = name;
  view->address = (uintptr_t)address;
  view->element_bytes = element_bytes;
  view->sizes[kGqaElement] = packed;
  view->strides[kGqaElement] = 1;
  for (int dim = kGqaHead; dim >= 0; --dim) {
    int64_t const size = sizes[dim], stride = given[dim] == 0 ? packed : given[dim];
    view->sizes[dim] = size;
    view->strides[dim] = stride;
    packed *= size;
    end += (uint64_t)(size - 1) * (uint64_t)stride;
  }
  view->bytes = (int64_t)(end * (uint64_t)element_bytes);
}

int32_t gqa_value_dim(GQADecodeConfig const* config) {
  return config->head_dim_v == 0 ? config->head_dim : config->head_dim_v;
}

// Those of tokens are as caches are, without their elements.
static void lay_out_scales(GQADecodeConfig const* c, gqa_tensors* t) {
  int64_t const sizes[kGqaDims] = {gqa_pool_rows(c), gqa_pool_tokens(c), c->num_kv_heads, 1};
  int64_t const k_strides[kGqaElement] = {c->k_scale_batch_stride, 0, 0};
  int64_t const v_strides[kGqaElement] = {c->v_scale_batch_stride, 0, 0};
  void const* const k_scales = c->scales_of_tokens ? c->k_scales : NULL;
  void const* const v_scales = c->scales_of_tokens ? c->v_scales : NULL;
  set_view(&t->views[kGqaKScales], "k_scales", k_scales, sizeof(float), sizes, k_strides);
  set_view(&t->views[kGqaVScales], "v_scales", v_scales, sizeof(float), sizes, v_strides);
}

void gqa_lay_out(GQADecodeConfig const* config, void const* const addresses[kGqaTensors],
                 gqa_tensors* t) {
  GQADecodeConfig const* c = config;
  int64_t const batch = c->batch_size, rows = gqa_pool_rows(c), tokens = gqa_pool_tokens(c);
  int64_t const q_heads = c->num_q_heads, kv_heads = c->num_kv_heads;
  int64_t const dim = c->head_dim, value_dim = gqa_value_dim(c);
  int64_t const asking = c->cu_seqlens_q == NULL ? batch : 1,
                each = gqa_all_query_tokens(c) / asking;
  int64_t const growing = c->cu_seqlens_k_new == NULL ? batch : 1;
  int64_t const appended = gqa_all_new_tokens(c) / growing;
  int64_t const sizes[kGqaTensors][kGqaDims] = {
      {asking, each, q_heads, value_dim}, {asking, each, q_heads, dim},
      {growing, appended, kv_heads, dim}, {growing, appended, kv_heads, value_dim},
      {rows, tokens, kv_heads, dim},      {rows, tokens, kv_heads, value_dim},
  };
  int64_t const strides[kGqaTensors][kGqaElement] = {
      {c->output_batch_stride, c->output_token_stride, c->output_head_stride},
      {c->q_batch_stride, c->q_token_stride, c->q_head_stride},
      {c->k_batch_stride, c->k_token_stride, c->k_head_stride},
      {c->v_batch_stride, c->v_token_stride, c->v_head_stride},
      {c->kv_cache_k_batch_stride, c->kv_cache_k_token_stride, c->kv_cache_k_head_stride},
      {c->kv_cache_v_batch_stride, c->kv_cache_v_token_stride, c->kv_cache_v_head_stride},
  };
  char const* const names[] = {"output", "q", "k", "v", "kv_cache_k", "kv_cache_v"};
  for (int i = 0; i < kGqaTensors; ++i) {
    int32_t element_bytes = kElementBytes;
    if (i == kGqaOutput && c->output_float32) element_bytes = (int32_t)sizeof(float);
    if (i >= kGqaKCache) element_bytes = gqa_cache_element_bytes(c);
    set_view(&t->views[i], names[i], addresses[i], element_bytes, sizes[i], strides[i]);
  }
  lay_out_scales(c, t);
  t->lse.address = 0;
  if (c->lse != NULL) {
    t->lse = gqa_span("lse", c->lse, (int64_t)sizeof(float) * gqa_all_query_tokens(c) * q_heads);
  }
  t->seqlens = NULL;
  t->overflow = NULL;
}

gqa_view gqa_span(char const* name, void const* address, int64_t bytes) {
  int64_t const sizes[kGqaDims] = {1, 1, 1, bytes}, strides[kGqaElement] = {0, 0, 0};
  gqa_view view;
  set_view(&view, name, address, 1, sizes, strides);
  return view;
}

// Whether two elements share an address, for layouts where one dimension nests in the next.
static int overlaps_itself(gqa_view const* view) {
  int order[kGqaDims];
  int64_t reach = 1;
  for (int dim = 0; dim < kGqaDims; ++dim) {  // by strides, the smallest first
    int at = dim;
    for (; at > 0 && view->strides[order[at - 1]] > view->strides[dim]; --at) {
      order[at] = order[at - 1];
    }
    order[at] = dim;
  }
  for (int i = 0; i < kGqaDims; ++i) {
    int64_t const size = view->sizes[order[i]], stride = view->strides[order[i]];
    if (size == 1) continue;
    if (stride < reach) return 1;
    reach += stride * (size - 1);
  }
  return 0;
}

// Bytes in floating point, where strides may be of any size.
static double reach_at_most(gqa_view const* view) {
  double last = 0;
  for (int dim = 0; dim < kGqaDims; ++dim) {
    last += (double)(view->sizes[dim] - 1) * (double)view->strides[dim];
  }
  return (last + 1) * view->element_bytes;
}

// Of what there is one behind the other: sequences, or pages.
static gqa_status check_view(gqa_view const* view, char const* outermost) {
  int64_t const* strides = view->strides;
  for (int dim = 0; dim < kGqaElement; ++dim) {
    if (strides[dim] < 0) {
      char field[32];
      snprintf(field, sizeof field, "%s_%s_stride", view->name, kDims[dim]);
      return gqa_fail_range(field, strides[dim], 0, (long long)kMaxBytes / kElementBytes);
    }
  }
  if (reach_at_most(view) > kMaxBytes) {
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: strides: got %s with %.4g bytes from its first element to its last; "
                    "allowed: up to %.4g. Nothing was launched.",
                    view->name, reach_at_most(view), kMaxBytes);
  }
  if (overlaps_itself(view)) {
    char tokens[48] = "";
    if (view->sizes[kGqaToken] > 1) {
      snprintf(tokens, sizeof tokens, ", %lld between tokens", (long long)strides[kGqaToken]);
    }
    return gqa_fail(GQA_ERROR_INVALID_VALUE,
                    "config: strides: got %s with %lld elements between %s%s and %lld "
                    "between heads of %lld; allowed: elements that do not share memory, and 0 for "
                    "strides of contiguous memory. Nothing was launched.",
                    view->name, (long long)strides[kGqaBatch], outermost, tokens,
                    (long long)strides[kGqaHead], (long long)view->sizes[kGqaElement]);
  }
  return GQA_SUCCESS;
}

static int64_t any_stride(GQADecodeConfig const* c) {
  return c->output_batch_stride | c->output_head_stride | c->q_batch_stride | c->q_head_stride |
         c->k_batch_stride | c->k_head_stride | c->v_batch_stride | c->v_head_stride |
         c->kv_cache_k_batch_stride | c->kv_cache_k_token_stride | c->kv_cache_k_head_stride |
         c->kv_cache_v_batch_stride | c->kv_cache_v_token_stride | c->kv_cache_v_head_stride |
         c->output_token_stride | c->q_token_stride | c->k_token_stride | c->v_token_stride;
}

gqa_status gqa_check_strides(GQADecodeConfig const* config) {
  void const* const nowhere[kGqaTensors] = {NULL, NULL, NULL, NULL, NULL, NULL};
  gqa_status status = GQA_SUCCESS;
  gqa_tensors t;
  if (any_stride(config) == 0) return GQA_SUCCESS;
  gqa_lay_out(config, nowhere, &t);
  for (int i = 0; status == GQA_SUCCESS && i < kGqaTensors; ++i) {
    int const is_pool = i >= kGqaKCache && config->block_table != NULL;
    status = check_view(&t.views[i], is_pool ? "pages" : "sequences");
  }
  return status;
}

// Length of the interval of bytes, modulo pitch, that holds all elements; 0 for none.
static int64_t reach_within(gqa_view const* view, int64_t pitch) {
  int64_t reach = view->element_bytes;
  for (int dim = 0; dim < kGqaDims; ++dim) {
    if (view->sizes[dim] == 1) continue;  // whose stride may be of any size
    int64_t const step = view->strides[dim] * view->element_bytes;
    if (step % pitch != 0) reach += step < pitch ? (view->sizes[dim] - 1) * step : pitch;
  }
  return reach <= pitch ? reach : 0;
}

int gqa_overlap(gqa_view const* a, gqa_view const* b) {
  uintptr_t const a_start = a->address, b_start = b->address;
  if (a_start == 0 || b_start == 0) return 0;
  if (a_start + (uintptr_t)a->bytes <= b_start) return 0;
  if (b_start + (uintptr_t)b->bytes <= a_start) return 0;
  // Each may lie, modulo some stride, in an interval of its own: slices of a fused projection,
  // keys and values in one buffer.
  for (int dim = 0; dim < kGqaElement; ++dim) {
    if (a->sizes[dim] == 1) continue;
    int64_t const pitch = a->strides[dim] * a->element_bytes;
    int64_t const difference = (int64_t)(b_start - a_start) % pitch;
    int64_t const offset = difference < 0 ? difference + pitch : difference;
    int64_t const a_reach = reach_within(a, pitch), b_reach = reach_within(b, pitch);
    if (a_reach > 0 && b_reach > 0 && a_reach <= offset && offset + b_reach <= pitch) return 0;
  }
  return 1;
}

int32_t gqa_vector_width(gqa_tensors const* t) {
  int32_t width = kWidest;
  uintptr_t bits = 0;  // of bytes
  for (int i = 0; i < kGqaTensors; ++i) {
    gqa_view const* view = &t->views[i];
    bits |= view->address;
    // Rows of 8 bits may be no multiple of the widest.
    if (view->element_bytes < kElementBytes) bits |= (uintptr_t)view->sizes[kGqaElement];
    for (int dim = 0; dim < kGqaElement; ++dim) {
      if (view->sizes[dim] > 1) bits |= (uintptr_t)(view->strides[dim] * view->element_bytes);
    }
  }
  while (width > 1 && bits % ((uintptr_t)width * kElementBytes) != 0) width /= 2;
  return width;
}

int32_t gqa_aligned_width(GQADecodeConfig const* config) {
  void const* const aligned[kGqaTensors] = {NULL, NULL, NULL, NULL, NULL, NULL};
  gqa_tensors t;
  gqa_lay_out(config, aligned, &t);
  return gqa_vector_width(&t);
}
