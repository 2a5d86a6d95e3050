// Bias: -slope * distance, by head (ALiBi, arXiv:2108.12409). Behind scale and cap.
#pragma once

#include <gqa/policy/slots.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

template <class T>
struct Alibi {
  float slope[T::kLaneHeads];  // per token that a key is older, in units of log2

  CUTE_DEVICE Alibi(Params const& p, Work<T> const& w) {
    constexpr float kLog2E = 1.44269504088896341f;
    float const* slopes = p.alibi_slopes + w.batch * int64_t(p.alibi_batch_stride);
    int const last = w.last_row();  // what rows that do not exist take, too
    CUTE_UNROLL
    for (int h = 0; h < T::kLaneHeads; ++h) {
      int const head = T::head_of(int(threadIdx.x) % kWarpSize, h);
      slope[h] = slopes[w.head_of(head < last ? head : last)] * -kLog2E;
    }
  }
  CUTE_DEVICE float operator()(float logit, int head, Position at) const {
    int const distance = at.query - at.token;  // below zero behind the query, where that is seen
    return fmaf(slope[head], float(kOneQuery<T> ? distance : abs(distance)), logit);
  }
};

}  // namespace gqa
