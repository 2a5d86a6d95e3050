// Result: as it was computed, in float32: an output that is a part, to be merged with others.
#pragma once

#include <cutlass/array.h>

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct InFloat32 {
  template <int kWidth>
  CUTE_DEVICE static auto rounded(cutlass::Array<float, kWidth> const& values) {
    return values;
  }
};

}  // namespace gqa
