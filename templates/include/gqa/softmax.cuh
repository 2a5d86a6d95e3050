// Stage 3, softmax: scores -> probabilities relative to a running maximum (online softmax,
// Milakov & Gimelshein, arXiv:1805.02867).
//
// The maximum is kept per warp and raised only when a score exceeds it by more than 2^kSlack
// (the idea is FlashAttention-4's): until then probabilities stay below 2^kSlack, which fp16 holds
// exactly as well as values below one, and the accumulator need not be touched.
#pragma once

#include "ptx.cuh"
#include "traits.cuh"

namespace gqa {

template <class T>
struct OnlineSoftmax {
  static constexpr float kSlack = 8.f;

  float row_max[T::kLaneHeads];

  CUTE_DEVICE OnlineSoftmax() {
    CUTE_UNROLL
    for (float& m : row_max) m = kNoMax;
  }

  // Turns scores (in units of log2) into probabilities in place. Calls rescale(factors) when what
  // has been accumulated so far must be multiplied by factors[head].
  template <class Rescale>
  CUTE_DEVICE void update(float (&scores)[T::kLaneHeads][T::kLaneTokens], Rescale&& rescale) {
    float tile_max[T::kLaneHeads];
    bool grows = false;
    CUTE_UNROLL
    for (int h = 0; h < T::kLaneHeads; ++h) {
      tile_max[h] = scores[h][0];
      CUTE_UNROLL
      for (int t = 1; t < T::kLaneTokens; ++t) tile_max[h] = fmaxf(tile_max[h], scores[h][t]);
      grows |= tile_max[h] > row_max[h] + kSlack;
    }
    if (__any_sync(0xffffffffu, grows)) raise(tile_max, rescale);
    CUTE_UNROLL
    for (int h = 0; h < T::kLaneHeads; ++h) {
      CUTE_UNROLL
      for (int t = 0; t < T::kLaneTokens; ++t) {
        scores[h][t] = exp2_approx(scores[h][t] - row_max[h]);
      }
    }
  }

  // One lane per head writes its maximum.
  CUTE_DEVICE void store(float* out) const {
    int const lane = threadIdx.x % kWarpSize;
    CUTE_UNROLL
    for (int h = 0; h < T::kLaneHeads; ++h) {
      int const head = T::kTensorOp ? h / 2 * 8 + lane * 2 + h % 2 : h;
      if (lane < T::kBlockH / T::kLaneHeads) out[head] = row_max[h];
    }
  }

 private:
  template <class Rescale>
  CUTE_DEVICE void raise(float (&tile_max)[T::kLaneHeads], Rescale&& rescale) {
    float factor[T::kLaneHeads];
    CUTE_UNROLL
    for (int h = 0; h < T::kLaneHeads; ++h) {
      CUTE_UNROLL
      for (int bit = T::kFirstLaneBit; bit <= T::kLastLaneBit; bit *= 2) {
        tile_max[h] = fmaxf(tile_max[h], __shfl_xor_sync(0xffffffffu, tile_max[h], bit));
      }
      tile_max[h] = fmaxf(tile_max[h], row_max[h]);
      factor[h] = exp2_approx(row_max[h] - tile_max[h]);
      row_max[h] = tile_max[h];
    }
    rescale(factor);
  }
};

}  // namespace gqa
