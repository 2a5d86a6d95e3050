// The kernels of this library, as data. gqa_kernels.c holds what was exported.
#ifndef GQA_KERNELS_H_
#define GQA_KERNELS_H_

#include <stdint.h>

#include "gqa_types.h"
#include "gqa_visibility.h"

#ifdef __cplusplus
extern "C" {
#endif

extern GQA_INTERNAL gqa_arch const gqa_archs[];
extern GQA_INTERNAL int32_t const gqa_num_archs;
extern GQA_INTERNAL gqa_kernel const gqa_kernels[];
extern GQA_INTERNAL int32_t const gqa_num_kernels;
extern GQA_INTERNAL gqa_model const gqa_dispatch_model;
extern GQA_INTERNAL gqa_limits const gqa_config_limits;

#ifdef __cplusplus
}
#endif

#endif  // GQA_KERNELS_H_
