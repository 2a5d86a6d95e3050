// Rotary: none, or before the call.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct Unrotated {
  CUTE_DEVICE static constexpr bool none() { return true; }
  CUTE_DEVICE static constexpr bool fits(Params const&, int, int, int) { return true; }

  template <class PairAt>
  CUTE_DEVICE static float2 turned(Params const&, int, int dim, PairAt&& pair_at) {
    return pair_at(dim);
  }
};

}  // namespace gqa
