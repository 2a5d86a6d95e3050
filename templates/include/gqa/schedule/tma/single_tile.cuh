// Short contexts, at most one tile per warp: warps exchange probabilities, and each computes some
// dims of O over all tiles of the block. What crosses the block is P, 256 bytes per tile and 8
// heads, where partial outputs would be 16 times as much.
#pragma once

#include <gqa/arch/mma.cuh>
#include <gqa/schedule/tma/block_reduce.cuh>
#include <gqa/schedule/tma/cluster_combine.cuh>
#include <gqa/schedule/tma/load_tma.cuh>
#include <gqa/schedule/tma/tile_scales.cuh>
#include <gqa/stage/append.cuh>
#include <gqa/stage/score.cuh>

namespace gqa {

// Turns a warp's scores into probabilities relative to the block's maximum. `sum` is that of this
// lane's probabilities. Holds a barrier.
template <class T>
CUTE_DEVICE void softmax_over_block(float (&scores)[T::kLaneHeads][T::kLaneTokens],
                                    float (&max)[T::kLaneHeads], float (&sum)[T::kLaneHeads],
                                    ClusterStorage<T>& shared) {
  CUTE_UNROLL
  for (int h = 0; h < T::kLaneHeads; ++h) {
    max[h] = fmaxf(scores[h][0], kNoMax);
    CUTE_UNROLL
    for (int t = 1; t < T::kLaneTokens; ++t) max[h] = fmaxf(max[h], scores[h][t]);
  }
  reduce_lanes<T>(max, Max());
  publish<T>(max, shared.row_max);
  __syncthreads();
  reduce_warps<T>(shared.row_max, max, Max());
  CUTE_UNROLL
  for (int h = 0; h < T::kLaneHeads; ++h) {
    sum[h] = 0.f;
    CUTE_UNROLL
    for (int t = 0; t < T::kLaneTokens; ++t) {
      scores[h][t] = exp2_approx(scores[h][t] - max[h]);
      sum[h] += scores[h][t];
    }
  }
}

// Puts a warp's P^T where all warps find it, as the MMA takes it.
template <class T>
CUTE_DEVICE void store_probability(float const (&probability)[T::kLaneHeads][T::kLaneTokens],
                                   ClusterStorage<T>& shared) {
  int const warp = threadIdx.x / kWarpSize;
  int const lane = threadIdx.x % kWarpSize;
  CUTE_UNROLL
  for (int t = 0; t < T::kBlockN / 16; ++t) {
    uint32_t operand[T::kBlockH / 8][2];
    probability_operand<T>(probability, 2 * t, operand);
    CUTE_UNROLL
    for (int n = 0; n < T::kBlockH / 8; ++n) {
      shared.probability[warp][t][n][lane] = make_uint2(operand[n][0], operand[n][1]);
    }
  }
}

// Adds the product of one 16-dim tile of V^T and P^T over the tiles of `count` warps.
template <class T>
struct DimTile {
  static constexpr int kHeadTiles = T::kBlockH / 8;

  float out[2][kHeadTiles][4] = {};  // two sums halve the chain of dependent MMAs

  template <bool kAll>
  CUTE_DEVICE void add(ClusterStorage<T>& shared, int dim_tile, int count) {
    int const lane = threadIdx.x % kWarpSize;
    auto const* values = reinterpret_cast<unsigned char const*>(
        &OperandsOf<T>::value_row(shared.value_slot(0, 0), dim_tile));
    _Pragma("unroll kAll ? T::kNumWarps : 1")
    for (int w = 0; w < (kAll ? T::kNumWarps : count); ++w) {
      CUTE_UNROLL
      for (int t = 0; t < T::kBlockN / 16; ++t) {
        constexpr int kWarpBytes = T::kPairElements * int(sizeof(typename T::Stored));
        uint32_t v[4];
        OperandsOf<T>::value_fragment(*reinterpret_cast<cute::uint128_t const*>(
                                          values + w * kWarpBytes + t * 16 * T::kBoxRowBytes),
                                      v);
        CUTE_UNROLL
        for (int n = 0; n < kHeadTiles; ++n) {
          uint2 const p = shared.probability[w][t][n][lane];
          uint32_t const operand[2] = {p.x, p.y};
          mma<typename T::Multiplied>(out[kAll ? w % 2 : 0][n], v, operand);
        }
      }
    }
  }

  CUTE_DEVICE float2 pair(int n, int half) const {
    return make_float2(out[0][n][2 * half] + out[1][n][2 * half],
                       out[0][n][2 * half + 1] + out[1][n][2 * half + 1]);
  }
};

template <class T>
CUTE_DEVICE void attend_single_tile(TmaParams const& p, ClusterWork<T> const& w,
                                    ClusterStorage<T>& shared, TmaRing<T>& ring,
                                    Scorer<T> const& score, TileScales<T>& scales,
                                    ClusterCombine<T> const& cluster_combine) {
  int const warp = threadIdx.x / kWarpSize;
  int const lane = threadIdx.x % kWarpSize;
  int const tiles = w.num_tiles - w.first_tile(0);  // of this block; may be more than it has warps
  int const left = w.tokens_in_tiles() - w.first_tile(warp) * T::kBlockN;

  // Where the results will go is known before the data are there.
  constexpr int kHeadTiles = T::kBlockH / 8;
  constexpr int kDimTiles = ceil_div(T::kHeadDimV, 16);
  constexpr int kOwnDimTiles = ceil_div(kDimTiles, T::kNumWarps);
  typename ClusterCombine<T>::Target target[kOwnDimTiles][2][kHeadTiles];
  CUTE_UNROLL
  for (int i = 0; i < kOwnDimTiles * 2 * kHeadTiles; ++i) {
    int const half = i / kHeadTiles % 2;
    int const dim_tile = i / (2 * kHeadTiles) * T::kNumWarps + warp;
    target[i / (2 * kHeadTiles)][half][i % kHeadTiles] = cluster_combine.target(
        dim_tile * 16 + half * OperandsOf<T>::kHalfStep + lane / 4 * OperandsOf<T>::kRowStep,
        i % kHeadTiles * 4 + lane % 4);
  }

  float scores[T::kLaneHeads][T::kLaneTokens];
  float max[T::kLaneHeads];
  float sum[T::kLaneHeads];
  CUTE_UNROLL
  for (int h = 0; h < T::kLaneHeads; ++h) {
    CUTE_UNROLL
    for (int t = 0; t < T::kLaneTokens; ++t) scores[h][t] = -kInfinity;
  }
  NewTokensOfTile<T> new_tokens(p.decode, w, w.first_tile(warp), ring);
  if (left > 0) {
    auto* keys = ring.wait_keys();
    new_tokens.put_keys(keys);
    scales.take(w.first_tile(warp), new_tokens, keys, ring);
    TileEnd const end = {left, left - 1 + w.behind_tiles()};
    scales.score(score, keys, end, Logits<T>(p.decode, w), scores);
    hide_padding<T>(w, w.first_tile(warp), scores);
  }
  scales.publish(shared);
  softmax_over_block<T>(scores, max, sum, shared);
  scales.scale(scores, sum, shared);
  if (kMayLoseTokens<T> && ring.lost()) {
    CUTE_UNROLL
    for (float& s : sum) s = kNan;
    report(p.decode, w);
  }
  store_probability<T>(scores, shared);
  reduce_lanes<T>(sum, Sum());
  publish<T>(sum, shared.row_sum);
  if (left > 0) {
    typename T::Stored* values = ring.wait_values();
    if (left < T::kBlockN) clear_rows<T>(values, left);
    if constexpr (!TileScales<T>::kWithRows) new_tokens.put_values(values);
    clear_hidden_rows<T>(w, w.first_tile(warp), values);
  } else {
    ring.drain();
  }
  __syncthreads();

  if (warp == T::kNumWarps - 1) {
    reduce_warps<T>(shared.row_sum, sum, Sum());
    cluster_combine.send_max_sum(max, sum);
  }
  CUTE_UNROLL
  for (int i = 0; i < kOwnDimTiles; ++i) {
    int const dim_tile = i * T::kNumWarps + warp;
    if (kDimTiles % T::kNumWarps != 0 && dim_tile >= kDimTiles) break;
    DimTile<T> o;
    if (tiles >= T::kNumWarps) {
      o.template add<true>(shared, dim_tile, T::kNumWarps);
    } else {
      o.template add<false>(shared, dim_tile, tiles);
    }
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      CUTE_UNROLL
      for (int n = 0; n < kHeadTiles; ++n) {
        target[i][half][n].send(scales.finish(o.pair(n, half)), cluster_combine.alone());
      }
    }
  }
}

}  // namespace gqa
