// Rotary: none, or before the call.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct Unrotated {
  CUTE_DEVICE static constexpr bool none() { return true; }
};

}  // namespace gqa
