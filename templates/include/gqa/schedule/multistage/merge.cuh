// Stage 6 of the multistage schedule: the partial outputs of a block's warps meet in its shared
// memory, those of the splits in global memory.
#pragma once

#include <gqa/schedule/multistage/storage.cuh>
#include <gqa/stage/combine.cuh>
#include <gqa/stage/output.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

// The block's partial: its warps' partials, all of them in shared memory.
template <class T, int kWidth>
CUTE_DEVICE Merged<kWidth> merge_warps(SharedStorage<T> const& shared, Slice s) {
  float2 max_sum[T::kNumWarps];
  float o[T::kNumWarps][kWidth];
  CUTE_UNROLL
  for (int i = 0; i < T::kNumWarps; ++i) {
    auto const* o_partial = reinterpret_cast<float const*>(shared.warp[i]);
    max_sum[i] = make_float2(shared.row_max[i][s.head], shared.row_sum[i][s.head]);
    float4 const v =
        *reinterpret_cast<float4 const*>(o_partial + s.head * T::kPartialPitch + s.dim);
    o[i][0] = v.x, o[i][1] = v.y, o[i][2] = v.z, o[i][3] = v.w;
  }
  Merged<kWidth> r;
  r.add_all(max_sum, o);
  return r;
}

// Called by the whole block after the barrier that follows the warps' stores.
template <class T>
CUTE_DEVICE void merge(Params const& p, Work<T> const& w, SharedStorage<T>& shared) {
  constexpr int kWidth = 4;
  constexpr int kPerHead = T::kHeadDimV / kWidth;
  auto const for_slices = [&](auto&& visit) {
    for (int i = threadIdx.x; i < w.num_rows() * kPerHead; i += T::kNumThreads) {
      visit(Slice{i / kPerHead, i % kPerHead * kWidth});
    }
  };
  bool const alone = w.num_splits == 1;
  PartialStore<T, kWidth> const store(p.split_workspace, w.first_partial(), w.num_partials());
  for_slices([&](Slice s) {
    Merged<kWidth> r = merge_warps<T, kWidth>(shared, s);
    if (alone) {
      write_output(p, w, s, cute::move(r));
    } else {
      store.write(w.split, s, r);
    }
  });
  if (alone || !arrives_last(p.merge_counters + w.head_index(), w.num_splits, shared.is_last))
    return;
  for_slices([&](Slice s) { write_output(p, w, s, store.merge(w.num_splits, s)); });
}

}  // namespace gqa
