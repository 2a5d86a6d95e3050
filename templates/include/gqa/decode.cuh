// One decode step of grouped-query attention in one launch: append the new token's K and V, attend
// over everything cached and the new token, write the output.
//
//   load (per warp) -> score -> softmax -> value -> merge warps -> merge splits
//        append
//
// A warp walks its tiles alone; warps meet once, at the end.
#pragma once

#include "append.cuh"
#include "load.cuh"
#include "merge.cuh"
#include "params.cuh"
#include "score.cuh"
#include "softmax.cuh"
#include "traits.cuh"
#include "value.cuh"
#include "work.cuh"

namespace gqa {

template <class T>
CUTE_DEVICE void attend(Params const& p, Work<T> const& w, SharedStorage<T>& shared) {
  int const warp = threadIdx.x / kWarpSize;
  TileRing<T> ring(p, w, shared.warp[warp]);
  ring.fill(w.first_tile(warp));
  if (w.appends && warp == T::kNumWarps - 1) NewToken<T>(p, w).append(p, w);

  Scorer<T> const score(p, w, shared);
  OnlineSoftmax<T> softmax;
  Accumulator<T> acc(shared);
  CUTE_NO_UNROLL
  for (int tile = w.first_tile(warp); tile < w.num_tiles; tile += w.tile_step()) {
    float scores[T::kLaneHeads][T::kLaneTokens];
    score(ring.wait_keys(), w.num_tokens - tile * T::kBlockN, p.scale_log2, scores);
    ring.refill_keys(tile);
    softmax.update(scores, [&](auto const& factor) { acc.rescale(factor); });
    acc.add(ring.wait_values(), scores);
    ring.refill_values(tile);
  }
  cute::cp_async_wait<0>();
  __syncwarp();
  acc.store(reinterpret_cast<float*>(shared.warp[warp]));
  softmax.store(shared.row_max[warp], shared.row_sum[warp]);
}

template <class Variant>
CUTE_DEVICE void decode(Params const& p) {
  using T = Traits<Variant>;
  extern __shared__ __align__(16) unsigned char storage[];
  auto& shared = *reinterpret_cast<SharedStorage<T>*>(storage);
  follow_previous_kernel();
  Work<T> const w(p);
  if (w.split >= w.num_splits) return;
  attend(p, w, shared);
  __syncthreads();
  merge(p, w, shared);
  report_overflow(p, w);
}

}  // namespace gqa
