// Bias: none.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct Unbiased {
  CUTE_DEVICE Unbiased(Params const&, Work<T> const&) {}
  CUTE_DEVICE float operator()(float logit, int, Position) const { return logit; }
};

}  // namespace gqa
