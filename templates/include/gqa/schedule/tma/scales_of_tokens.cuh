// Scales of tokens in the TMA schedule, for kernels that include this header.
//
// A single new token's lie behind its rows in shared memory, where 16 bytes are free; those of
// several where their warp's probabilities will. Warps that multiply each other's tiles agree on
// what all values' scales are relative to: the largest of each warp lies where the new token's
// scores will.
#pragma once

#include <gqa/policy/element_fp8_tokens.cuh>
#include <gqa/schedule/tma/tile_scales.cuh>

namespace gqa {

template <class T>
CUTE_DEVICE float* scales_of_warp() {
  extern __shared__ __align__(1024) unsigned char storage[];
  auto& shared = *reinterpret_cast<ClusterStorage<T>*>(storage);
  static_assert(sizeof(shared.probability[0]) >= T::kBlockN * sizeof(float));
  return reinterpret_cast<float*>(shared.probability[threadIdx.x / kWarpSize]);
}

template <class T>
class TileScalesOfTokens : public TokenScales<T> {
 public:
  CUTE_DEVICE TileScalesOfTokens(Params const& p, Work<T> const& w) : TokenScales<T>(p, w) {}

  CUTE_DEVICE void score(Scorer<T> const& scorer, typename T::Stored const* keys, TileEnd end,
                         Logits<T> const& logit, float (&scores)[T::kLaneHeads][T::kLaneTokens]) {
    score_tile<T>(scorer, keys, end, logit, *this, scores);
  }

  static constexpr bool kWithRows = !kOneQuery<T>;
  template <class Ring>
  CUTE_DEVICE void take(int tile, NewTokensOfTile<T>& new_tokens, uint16_t* keys, Ring& ring) {
    if constexpr (kWithRows) {
      if (!NewTokens<T>::are_in(this->work(), tile)) return;
      this->take_keys(tile, keys);
      __syncwarp();  // others take their place
      uint16_t* values = ring.wait_values();
      new_tokens.put_values(values);
      this->take_values(tile, values);
      __syncwarp();
    }
  }

  CUTE_DEVICE void scale(float (&probability)[T::kLaneHeads][T::kLaneTokens],
                         float (&row_sum)[T::kLaneHeads], Accumulator<T>& acc) {
    range_.scale(*this, acc, probability, row_sum);
  }
  CUTE_DEVICE void finish(Accumulator<T>& acc) const { range_.finish(acc); }

  CUTE_DEVICE void publish(ClusterStorage<T>& shared) const {
    float const largest = largest_of_warp(this->value);
    if (int(threadIdx.x) % kWarpSize == 0) table(shared)[threadIdx.x / kWarpSize] = largest;
  }
  CUTE_DEVICE void scale(float (&probability)[T::kLaneHeads][T::kLaneTokens],
                         float (&row_sum)[T::kLaneHeads], ClusterStorage<T>& shared) {
    range_.cover(largest_of_warp(table(shared)[int(threadIdx.x) % T::kNumWarps]));
    range_.scale(*this, probability, row_sum);
  }
  CUTE_DEVICE float2 finish(float2 sums) const {
    return make_float2(sums.x * range_.unit(), sums.y * range_.unit());
  }

  CUTE_DEVICE static void store(NewToken<T> const& token, ClusterStorage<T>& shared) {
    if (int(threadIdx.x) % kWarpSize != 0) return;
    *scale_behind<typename T::KeyTile>(shared.new_key) = token.key.scale;
    *scale_behind<typename T::ValueTile>(shared.new_value) = token.value.scale;
  }
  CUTE_DEVICE static Scorer<T> of_new_key(Scorer<T> const& scorer, ClusterStorage<T>& shared) {
    Scorer<T> scaled = scorer;
    float const scale = *scale_behind<typename T::KeyTile>(shared.new_key);
    CUTE_UNROLL
    for (float& factor : scaled.factor) factor *= scale;
    return scaled;
  }

 private:
  CUTE_DEVICE static float* table(ClusterStorage<T>& shared) { return shared.new_score[0]; }

  ValueRange<T> range_;
};

template <class T>
struct TileScales<T, E4m3OfTokens<T>> : TileScalesOfTokens<T> {
  using TileScalesOfTokens<T>::TileScalesOfTokens;
};
template <class T>
struct TileScales<T, E5m2OfTokens<T>> : TileScalesOfTokens<T> {
  using TileScalesOfTokens<T>::TileScalesOfTokens;
};

}  // namespace gqa
