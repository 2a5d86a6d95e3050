// Shared memory of one block of the TMA schedule.
#pragma once

#include <gqa/stage/prepared_queries.cuh>
#include <gqa/traits.cuh>

namespace gqa {

constexpr int kMaxCluster = 8;

// The ring of tiles follows it, num_stages * kStageBytes: as many stages as the launch asks for, at
// most kNumStages.
template <class T>
struct alignas(1024) ClusterStorage : PreparedQueries<T> {
  using Element = typename T::Stored;
  static constexpr int kStageBytes = T::kNumWarps * T::kPairElements * int(sizeof(Element));

  // Of a warp: what its lanes and, after a barrier, those of other warps read.
  alignas(16) float row_max[T::kBlockH][T::kNumWarps];
  alignas(16) float row_sum[T::kBlockH][T::kNumWarps];
  // P^T of a warp's tile, as the MMA takes it, when all warps multiply it.
  uint2 probability[T::kNumWarps][T::kBlockN / 16][T::kBlockH / 8][kWarpSize];
  // The new token, and its scores.
  alignas(16) Element new_key[T::KeyTile::kRowStride];
  alignas(16) Element new_value[T::ValueTile::kRowStride];
  float new_score[T::kNumWarps][T::kBlockH];  // each warp that needs them computes them

  // What the cluster's blocks send here: (m, l), and O for the dims that this block owns.
  float2 max_sum[kMaxCluster][T::kBlockH];
  float2 out[(T::kHeadDimV + 4 * kMaxCluster) * T::kBlockH / 2];  // [block][dim][pair of heads]

  uint64_t ring_barrier[T::kNumStages][T::kNumWarps][2];  // of K and of V
  uint64_t combine_barrier;
  uint32_t is_last;

  CUTE_DEVICE Element* key_slot(int stage, int warp) {
    return slots() + (stage * T::kNumWarps + warp) * T::kPairElements;
  }
  CUTE_DEVICE Element* value_slot(int stage, int warp) {
    return key_slot(stage, warp) + T::KeyTile::kElements;
  }
  // A warp's partial O, [dim][head]: it takes the place of the warp's first tiles.
  CUTE_DEVICE float* o_partial(int warp) { return reinterpret_cast<float*>(key_slot(0, warp)); }

 private:
  CUTE_DEVICE Element* slots() { return reinterpret_cast<Element*>(this + 1); }

  static_assert(T::kHeadDimV * T::kBlockH * sizeof(float) <= T::kPairElements * sizeof(Element));
};

// What a launch with all stages takes.
template <class T>
constexpr int kLargestStorage =
    int(sizeof(ClusterStorage<T>)) + T::kNumStages * ClusterStorage<T>::kStageBytes;

}  // namespace gqa
