// Problem to kernel and launch shape: the decisions of the Python package's dispatch/, with which a
// test compares these.
#ifndef GQA_DISPATCH_H_
#define GQA_DISPATCH_H_

#include <stdint.h>

#include "gqa_types.h"
#include "gqa_visibility.h"

#ifdef __cplusplus
extern "C" {
#endif

// Zero where this library has no kernel for the problem.
GQA_INTERNAL int gqa_choose(gqa_problem const* problem, gqa_target const* target,
                            gqa_dispatch* chosen);

// Index of the architecture among those exported that fits a compute capability best, or -1.
GQA_INTERNAL int32_t gqa_find_arch(int32_t capability);

#ifdef __cplusplus
}
#endif

#endif  // GQA_DISPATCH_H_
