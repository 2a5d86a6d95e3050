// Norm: none.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct Unnormed {
  CUTE_DEVICE static constexpr bool none() { return true; }

  struct Factors {
    CUTE_DEVICE Factors(Params const&, Side, float) {}
    CUTE_DEVICE float2 operator()(float2 x, int) const { return x; }
  };
};

}  // namespace gqa
