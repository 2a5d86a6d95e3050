// What the files behind the public functions need of each other: a call goes through check, layout,
// device, dispatch and launch, in this order. All that can be refused sets the thread's last error.
#ifndef GQA_INTERNAL_H_
#define GQA_INTERNAL_H_

#include <stddef.h>
#include <stdint.h>

#include "gqa_attention_decode.h"
#include "gqa_dispatch.h"
#include "gqa_driver.h"
#include "gqa_visibility.h"

#ifdef __cplusplus
extern "C" {
#endif

// Counters come first in the workspace and have room of a fixed size, so that one configuration's
// partial outputs never lie where another's counters are, which must stay zero.
enum { kElementBytes = 2, kMergeCounterBytes = 65536 };

static double const kLog2E = 1.4426950408889634;
static double const kMaxBytes = 140737488355328.0;  // 2^47: sums of sizes stay in 64 bits

struct gqa_params;

// The tensors of a call, in its order; and scales of tokens, to which is written as to the caches.
enum { kGqaOutput, kGqaQ, kGqaK, kGqaV, kGqaKCache, kGqaVCache, kGqaTensors };
enum { kGqaKScales = kGqaTensors, kGqaVScales, kGqaViews };

// Dimensions of a view; tensors of one token have one, and those with an index of the sequences'
// ends have one sequence of all tokens.
enum { kGqaBatch, kGqaToken, kGqaHead, kGqaElement, kGqaDims };

// Memory as strides lay it out.
typedef struct gqa_view {
  char const* name;
  uintptr_t address;
  int64_t sizes[kGqaDims];
  int64_t strides[kGqaDims];  // in elements
  int64_t bytes;              // from the first element to the end of the last
  int32_t element_bytes;
} gqa_view;

// A call's tensors.
typedef struct gqa_tensors {
  gqa_view views[kGqaViews];  // of scales at address 0: none, or others than those of tokens
  gqa_view lse;               // at address 0: none
  int32_t const* seqlens;
  int32_t* overflow;
} gqa_tensors;

// -- gqa_error.c

// Sets the last error, and returns the status.
GQA_INTERNAL gqa_status gqa_fail(gqa_status status, char const* format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;
GQA_INTERNAL gqa_status gqa_fail_range(char const* what, long long got, long long from,
                                       long long to);
GQA_INTERNAL gqa_status gqa_fail_in_driver(gqa_driver const* driver, gqa_cu_result error,
                                           gqa_status status, char const* doing, char const* what);

// -- gqa_check.c

// The caller's configuration as this library has it, and checked but for its length: fields that an
// older caller's lacks have their defaults, and what a newer one sets beyond is refused.
GQA_INTERNAL gqa_status gqa_read_config(GQADecodeConfig const* given, GQADecodeConfig* config);

// Whether the caller's structure is of a size that can be written to.
GQA_INTERNAL gqa_status gqa_check_launch(gqa_launch const* launched);

// The one length of all sequences.
GQA_INTERNAL gqa_status gqa_check_length(GQADecodeConfig const* config);

// Addresses, and what may not share memory.
GQA_INTERNAL gqa_status gqa_check_tensors(GQADecodeConfig const* config, gqa_tensors const* t);

// The same of the lengths on the device.
GQA_INTERNAL gqa_status gqa_check_lengths(GQADecodeConfig const* config, gqa_tensors const* t);

GQA_INTERNAL gqa_status gqa_check_workspace(GQADecodeConfig const* config,
                                            gqa_dispatch const* chosen);

// -- gqa_layout.c

// Where a call's tensors are, by the configuration.
GQA_INTERNAL void gqa_lay_out(GQADecodeConfig const* config,
                              void const* const addresses[kGqaTensors], gqa_tensors* t);

// Elements per head of values and outputs.
GQA_INTERNAL int32_t gqa_value_dim(GQADecodeConfig const* config);

// So many bytes in a row.
GQA_INTERNAL gqa_view gqa_span(char const* name, void const* address, int64_t bytes);

// Strides that are negative, or so large that sums of them are no 64-bit numbers, or with which
// elements share memory.
GQA_INTERNAL gqa_status gqa_check_strides(GQADecodeConfig const* config);

// Whether two views may share memory. Those that interleave are told apart.
GQA_INTERNAL int gqa_overlap(gqa_view const* a, gqa_view const* b);

// Widest access, in elements of 16 bits, to which all rows are aligned.
GQA_INTERNAL int32_t gqa_vector_width(gqa_tensors const* t);

// The same of tensors aligned to 16 bytes.
GQA_INTERNAL int32_t gqa_aligned_width(GQADecodeConfig const* config);

// -- gqa_features.c

// Memory on the device that a feature reads and does not write.
typedef struct gqa_memory {
  char const* name;
  void const* address;  // or null
  int64_t bytes;
  int32_t alignment;
} gqa_memory;

enum { kGqaFeatureTensors = 16 };

// The features that a configuration asks for, as bits.
GQA_INTERNAL int32_t gqa_features_of(GQADecodeConfig const* config);

// Writes their names, as the configuration's fields have them.
GQA_INTERNAL void gqa_name_features(int32_t features, char* text, size_t size);

// What they read.
GQA_INTERNAL void gqa_feature_tensors(GQADecodeConfig const* config,
                                      gqa_memory tensors[kGqaFeatureTensors]);

// Their values, and how addresses are aligned.
GQA_INTERNAL gqa_status gqa_check_features(GQADecodeConfig const* config);

// A field that is 0 or 1.
GQA_INTERNAL gqa_status gqa_check_flag(char const* field, int32_t value);

// A field that is any gqa_dtype.
GQA_INTERNAL gqa_status gqa_check_number(char const* field, int32_t dtype);

// What the kernels call it.
GQA_INTERNAL int32_t gqa_number_of(int32_t dtype);

// Rows of the caches, or of the table of pages.
GQA_INTERNAL int64_t gqa_cache_rows(GQADecodeConfig const* config);

// What they put into a kernel's argument.
GQA_INTERNAL void gqa_bind_features(GQADecodeConfig const* config, struct gqa_params* params);

// -- gqa_pages.c

// Checks what is said of pages, and sets max_seq_len where they say it.
GQA_INTERNAL gqa_status gqa_settle_pages(GQADecodeConfig* config);

// What the caches have in their first dimension, and in their second: sequences and their tokens,
// or pages and theirs.
GQA_INTERNAL int64_t gqa_pool_rows(GQADecodeConfig const* config);
GQA_INTERNAL int32_t gqa_pool_tokens(GQADecodeConfig const* config);

// Of the table, from its first entry to the end of its last.
GQA_INTERNAL int64_t gqa_table_bytes(GQADecodeConfig const* config);

// What pages put into a kernel's argument.
GQA_INTERNAL void gqa_bind_pages(GQADecodeConfig const* config, struct gqa_params* params);

// -- gqa_tokens.c

// Query tokens of a sequence, at most, and tokens that are appended to each; 0 where they differ.
GQA_INTERNAL int32_t gqa_query_tokens(GQADecodeConfig const* config);
GQA_INTERNAL int32_t gqa_new_tokens(GQADecodeConfig const* config);

// Those of all sequences.
GQA_INTERNAL int64_t gqa_all_query_tokens(GQADecodeConfig const* config);
GQA_INTERNAL int64_t gqa_all_new_tokens(GQADecodeConfig const* config);

// Bytes of a mask of drafts.
GQA_INTERNAL int64_t gqa_tree_bytes(GQADecodeConfig const* config);

// Whether one query and one new token per sequence are not all.
GQA_INTERNAL int gqa_several_tokens(GQADecodeConfig const* config);

// Checks what is said of them.
GQA_INTERNAL gqa_status gqa_check_tokens(GQADecodeConfig const* config);

// What they put into a kernel's argument.
GQA_INTERNAL void gqa_bind_tokens(GQADecodeConfig const* config, gqa_tensors const* t,
                                  struct gqa_params* params);

// -- gqa_turning.c

// Bytes of a number of any gqa_dtype.
GQA_INTERNAL int32_t gqa_number_bytes(int32_t dtype);

// Of a table of angles, from its first number to the end of its last.
GQA_INTERNAL int64_t gqa_rotary_bytes(GQADecodeConfig const* config, int64_t stride);

// The longest length for which tables of angles have the positions of all tokens.
GQA_INTERNAL int64_t gqa_longest_to_turn(GQADecodeConfig const* config);

// Checks what is said of norms and rotations.
GQA_INTERNAL gqa_status gqa_check_turning(GQADecodeConfig const* config);

// What they put into a kernel's argument.
GQA_INTERNAL void gqa_bind_turning(GQADecodeConfig const* config, struct gqa_params* params);

// -- gqa_stored.c

// The feature that caches of 8 bits are, as a bit; 0 for those of 16.
GQA_INTERNAL int32_t gqa_stored_as(GQADecodeConfig const* config);

GQA_INTERNAL int32_t gqa_cache_element_bytes(GQADecodeConfig const* config);

// Elements of a cache in 16 bits.
GQA_INTERNAL int32_t gqa_packed(int32_t features);

// Their type in a message, where they are of 8 bits.
GQA_INTERNAL char const* gqa_name_stored(int32_t features);

// Of scales on the device, from the first to the end of the last.
GQA_INTERNAL int64_t gqa_scale_bytes(GQADecodeConfig const* config, int32_t batch_stride,
                                     int32_t head_stride);

// Checks what is said of types and scales.
GQA_INTERNAL gqa_status gqa_check_stored(GQADecodeConfig const* config);

// Whether rows are as aligned as scales of tokens want them.
GQA_INTERNAL gqa_status gqa_check_aligned(gqa_problem const* problem);

// Whether rows of a cache begin with a whole pair of elements of 8 bits.
GQA_INTERNAL gqa_status gqa_check_pairs(gqa_view const* cache);

// A cache as kernels see it: in elements of 16 bits.
GQA_INTERNAL gqa_view gqa_in_pairs(gqa_view const* cache);

// What they put into a kernel's argument.
GQA_INTERNAL void gqa_bind_stored(GQADecodeConfig const* config, struct gqa_params* params);

// -- gqa_device.c

// What the current device is.
GQA_INTERNAL gqa_status gqa_find_current(gqa_driver const** driver, gqa_cu_device* device,
                                         gqa_target* target);

// A kernel that is loaded, and ready on a device.
GQA_INTERNAL gqa_status gqa_find_function(gqa_driver const* driver, gqa_kernel const* kernel,
                                          gqa_cu_device device, int32_t arch,
                                          gqa_cu_kernel* function);

// -- gqa_dispatch.c

// Blocks that share a KV head, for so many query tokens of a sequence.
GQA_INTERNAL int64_t gqa_row_blocks(gqa_kernel const* kernel, int64_t num_tokens);

GQA_INTERNAL gqa_problem gqa_describe(GQADecodeConfig const* config, int32_t vec_width, int ragged);

// As gqa_choose; fails where this library has no kernel for the problem.
GQA_INTERNAL gqa_status gqa_find_kernel(gqa_problem const* problem, gqa_target const* target,
                                        gqa_dispatch* chosen);

// Bytes of workspace of a launch.
GQA_INTERNAL size_t gqa_workspace_of(gqa_dispatch const* chosen);

// -- gqa_launch.c

GQA_INTERNAL gqa_status gqa_launch_kernel(gqa_driver const* driver, GQADecodeConfig const* config,
                                          gqa_tensors const* t, gqa_dispatch const* chosen,
                                          gqa_cu_kernel function, gqa_stream_t stream);

// A line for the callback, if there is one.
GQA_INTERNAL void gqa_log_launch(GQADecodeConfig const* config, gqa_tensors const* t,
                                 gqa_dispatch const* chosen, gqa_cu_device device,
                                 gqa_stream_t stream);

#ifdef __cplusplus
}
#endif

#endif  // GQA_INTERNAL_H_
