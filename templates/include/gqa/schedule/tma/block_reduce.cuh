// What the warps of a block tell each other about their heads: tables in shared memory.
#pragma once

#include <gqa/schedule/tma/storage_tma.cuh>

namespace gqa {

struct Max {
  CUTE_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  CUTE_DEVICE float operator()(float a, float b) const { return a + b; }
};

// Reduces over the lanes that hold other tokens of the same heads.
template <class T, class Combine>
CUTE_DEVICE void reduce_lanes(float (&values)[T::kLaneHeads], Combine&& combine) {
  CUTE_UNROLL
  for (int bit = T::kFirstLaneBit; bit <= T::kLastLaneBit; bit *= 2) {
    CUTE_UNROLL
    for (float& v : values) v = combine(v, __shfl_xor_sync(0xffffffffu, v, bit));
  }
}

// Writes what one warp has of every head to a table, [head][warp].
template <class T>
CUTE_DEVICE void publish(float const (&values)[T::kLaneHeads],
                         float (&table)[T::kBlockH][T::kNumWarps]) {
  int const lane = threadIdx.x % kWarpSize;
  if (lane >= T::kBlockH / T::kLaneHeads) return;
  CUTE_UNROLL
  for (int h = 0; h < T::kLaneHeads; ++h) {
    table[T::head_of(lane, h)][threadIdx.x / kWarpSize] = values[h];
  }
}

// Combines what all warps have of this lane's heads.
template <class T, class Combine>
CUTE_DEVICE void reduce_warps(float const (&table)[T::kBlockH][T::kNumWarps],
                              float (&values)[T::kLaneHeads], Combine&& combine) {
  int const lane = threadIdx.x % kWarpSize;
  CUTE_UNROLL
  for (int h = 0; h < T::kLaneHeads; ++h) {
    auto const* row = reinterpret_cast<float4 const*>(table[T::head_of(lane, h)]);
    CUTE_UNROLL
    for (int i = 0; i < T::kNumWarps / 4; ++i) {
      float4 const v = row[i];
      float const four = combine(combine(v.x, v.y), combine(v.z, v.w));
      values[h] = i == 0 ? four : combine(values[h], four);
    }
  }
}

}  // namespace gqa
