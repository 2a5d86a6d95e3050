// Programmatic dependent launch: kernels that start before the one before them in the stream is
// done.
#pragma once

#include <gqa/arch/ptx.cuh>
#include <gqa/params.cuh>

namespace gqa {

// What a kernel that started before the one before it was done does before it reads anything. All
// blocks call it.
template <class Prefetch>
CUTE_DEVICE void follow_previous_kernel(Pdl pdl, Prefetch&& prefetch) {
  if (pdl == Pdl::kWhole) prefetch();
  wait_for_previous_kernel();
  if (pdl == Pdl::kWhole) start_next_kernel();
}

}  // namespace gqa
