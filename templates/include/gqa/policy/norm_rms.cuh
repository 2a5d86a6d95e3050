// Norm: every head of queries and new keys is divided by the root of its mean square and multiplied
// by weights (RMSNorm, arXiv:1910.07467; of q and k in Qwen3 and Gemma 3), before it is rotated.
#pragma once

#include <gqa/arch/number.cuh>
#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct RmsNormed {
  CUTE_DEVICE static constexpr bool none() { return false; }

  template <int kCount>
  struct Weights {
    NumberType type;
    bool exist;  // or else this side is not normed
    NumberPair weight[kCount] = {};

    CUTE_DEVICE Weights(Params const& p, Side side, int const (&dims)[kCount]) {
      bool const is_query = side == Side::kQuery;
      void const* weights = is_query ? p.q_norm_weight : p.k_norm_weight;
      type = is_query ? p.q_norm_type : p.k_norm_type;
      exist = weights != nullptr;
      CUTE_UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (exist) weight[i].load(weights, type, dims[i], dims[i] + 1);
      }
    }
    CUTE_DEVICE static float factor(Params const& p, float sum_of_squares) {
      return rsqrtf(fmaf(sum_of_squares, 1.f / T::kHeadDim, p.norm_eps));
    }
    CUTE_DEVICE float2 normed(Params const& p, float2 x, float factor, int i) const {
      float2 const w = weight[i].value(type);
      float2 const normed = {x.x * factor * (w.x + p.norm_offset),
                             x.y * factor * (w.y + p.norm_offset)};
      return exist ? normed : x;
    }
  };
};

}  // namespace gqa
