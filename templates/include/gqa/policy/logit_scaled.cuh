// Logit: softmax_scale * dot.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct Scaled {
  float scale_log2;

  CUTE_DEVICE explicit Scaled(Params const& p) : scale_log2(p.scale_log2) {}
  CUTE_DEVICE float operator()(float dot, int, Position) const { return dot * scale_log2; }
};

}  // namespace gqa
