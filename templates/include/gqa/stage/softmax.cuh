// Stage 3, softmax: scores -> probabilities relative to a running maximum (online softmax,
// Milakov & Gimelshein, arXiv:1805.02867). The largest score so far has probability one exactly, so
// a dominating key loses nothing when P is rounded for the MMA.
#pragma once

#include <gqa/arch/ptx.cuh>
#include <gqa/traits.cuh>

namespace gqa {

template <class T>
struct OnlineSoftmax {
  float row_max[T::kLaneHeads];       // of the warp's scores
  float row_sum[T::kLaneHeads] = {};  // of this lane's probabilities

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
      grows |= tile_max[h] > row_max[h];
    }
    if (__any_sync(0xffffffffu, grows)) raise(tile_max, rescale);
    CUTE_UNROLL
    for (int h = 0; h < T::kLaneHeads; ++h) {
      CUTE_UNROLL
      for (int t = 0; t < T::kLaneTokens; ++t) {
        scores[h][t] = exp2_approx(scores[h][t] - row_max[h]);
        row_sum[h] += scores[h][t];
      }
    }
  }

  // Makes the output no number, whatever it is merged with.
  CUTE_DEVICE void spoil() {
    CUTE_UNROLL
    for (float& sum : row_sum) sum = kNan;
  }

  // Writes every head's maximum and sum, [head].
  CUTE_DEVICE void store(float* max_out, float* sum_out) const {
    int const lane = threadIdx.x % kWarpSize;
    CUTE_UNROLL
    for (int h = 0; h < T::kLaneHeads; ++h) {
      int const head = T::head_of(lane, h);
      float sum = row_sum[h];
      CUTE_UNROLL
      for (int bit = T::kFirstLaneBit; bit <= T::kLastLaneBit; bit *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, bit);
      }
      if (lane < T::kBlockH / T::kLaneHeads) {
        max_out[head] = row_max[h];
        sum_out[head] = sum;
      }
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
      row_sum[h] *= factor[h];
    }
    rescale(factor);
  }
};

}  // namespace gqa
