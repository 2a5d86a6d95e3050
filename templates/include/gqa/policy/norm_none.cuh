// Norm: none.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct Unnormed {
  CUTE_DEVICE static constexpr bool none() { return true; }

  template <int kCount>
  struct Weights {
    CUTE_DEVICE Weights(Params const&, Side, int const (&)[kCount]) {}
    CUTE_DEVICE static float factor(Params const&, float) { return 1.f; }
    CUTE_DEVICE static float2 normed(Params const&, float2 x, float, int) { return x; }
  };
};

}  // namespace gqa
