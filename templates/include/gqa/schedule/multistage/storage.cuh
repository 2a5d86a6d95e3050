// Shared memory of one block of the multistage schedule.
#pragma once

#include <gqa/stage/prepared_queries.cuh>
#include <gqa/traits.cuh>

namespace gqa {

// The launcher asks for sizeof(SharedStorage<T>) bytes.
template <class T>
struct SharedStorage : PreparedQueries<T> {
  // A warp's K and V stages; when its tiles are done, its partial output.
  alignas(16) unsigned char warp[T::kNumWarps][T::kWarpBytes];
  float row_max[T::kNumWarps][T::kBlockH];
  float row_sum[T::kNumWarps][T::kBlockH];
  // CUDA cores only: the queries in fp32, and each warp's probabilities.
  alignas(16) float query[T::kTensorOp ? 1 : T::kBlockH][T::kTensorOp ? 4 : T::kHeadDim];
  alignas(16) float probability[T::kTensorOp ? 1 : T::kNumWarps][T::kTensorOp ? 1 : T::kBlockH]
                               [T::kTensorOp ? 4 : T::kBlockN];
  uint32_t is_last;
};

}  // namespace gqa
