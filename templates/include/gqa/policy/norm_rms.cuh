// Norm: every head of queries and new keys is divided by the root of its mean square and multiplied
// by weights (RMSNorm, arXiv:1910.07467; of q and k in Qwen3 and Gemma 3), before it is rotated.
#pragma once

#include <gqa/arch/number.cuh>
#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct RmsNormed {
  CUTE_DEVICE static constexpr bool none() { return false; }

  struct Factors {
    void const* weight;  // null: this side is not normed
    NumberType type;
    float offset, factor;

    CUTE_DEVICE Factors(Params const& p, Side side, float sum_of_squares)
        : weight(side == Side::kQuery ? p.q_norm_weight : p.k_norm_weight),
          type(side == Side::kQuery ? p.q_norm_type : p.k_norm_type),
          offset(p.norm_offset),
          factor(rsqrtf(sum_of_squares * (1.f / T::kHeadDim) + p.norm_eps)) {}
    CUTE_DEVICE float2 operator()(float2 x, int dim) const {
      if (weight == nullptr) return x;
      return {x.x * factor * (number_at(weight, type, dim) + offset),
              x.y * factor * (number_at(weight, type, dim + 1) + offset)};
    }
  };
};

}  // namespace gqa
