// What the files behind the public functions need of each other: a call goes through check, device,
// dispatch and launch, in this order. All that can be refused sets the thread's last error.
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

struct gqa_params;

// A call's tensors.
typedef struct gqa_tensors {
  void* out;
  void const* q;
  void const* k;
  void const* v;
  void* k_cache;
  void* v_cache;
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

// -- gqa_features.c

// Memory on the device that a feature reads.
typedef struct gqa_memory {
  char const* name;
  void const* address;  // or null
  int64_t bytes;
  int32_t alignment;
} gqa_memory;

enum { kGqaFeatureTensors = 4 };

// The features that a configuration asks for, as bits.
GQA_INTERNAL int32_t gqa_features_of(GQADecodeConfig const* config);

// Writes their names, as the configuration's fields have them.
GQA_INTERNAL void gqa_name_features(int32_t features, char* text, size_t size);

// What they read.
GQA_INTERNAL void gqa_feature_tensors(GQADecodeConfig const* config,
                                      gqa_memory tensors[kGqaFeatureTensors]);

// Their values, and how addresses are aligned.
GQA_INTERNAL gqa_status gqa_check_features(GQADecodeConfig const* config);

// Rows of the caches.
GQA_INTERNAL int64_t gqa_cache_rows(GQADecodeConfig const* config);

// What they put into a kernel's argument.
GQA_INTERNAL void gqa_bind_features(GQADecodeConfig const* config, struct gqa_params* params);

// -- gqa_device.c

// What the current device is.
GQA_INTERNAL gqa_status gqa_find_current(gqa_driver const** driver, gqa_cu_device* device,
                                         gqa_target* target);

// A kernel that is loaded, and ready on a device.
GQA_INTERNAL gqa_status gqa_find_function(gqa_driver const* driver, gqa_kernel const* kernel,
                                          gqa_cu_device device, gqa_cu_kernel* function);

// -- gqa_dispatch.c

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
