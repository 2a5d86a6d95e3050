// Stage 5, append: the new token's K and V into the cache, bit for bit, once per KV head.
#pragma once

#include "load.cuh"

namespace gqa {

// Called by one warp per (sequence, KV head). Nobody reads this row from the cache in this launch.
template <class T>
CUTE_DEVICE void append_row(void const* new_base, Strides new_stride, void* cache_base,
                            Strides cache_stride, Work<T> const& w) {
  using Element = typename T::Element;
  auto const* source = static_cast<Element const*>(new_base) + w.batch * new_stride.batch +
                       w.kv_head * new_stride.head;
  auto* target = static_cast<Element*>(cache_base) + w.batch * cache_stride.batch +
                 w.num_cached * cache_stride.token + w.kv_head * cache_stride.head;
  for (int vec = int(threadIdx.x) % kWarpSize; vec < T::kHeadDim / T::kVecWidth; vec += kWarpSize) {
    reinterpret_cast<Vector<T>*>(target)[vec] = reinterpret_cast<Vector<T> const*>(source)[vec];
  }
}

template <class T>
CUTE_DEVICE void append(Params const& p, Work<T> const& w) {
  bool const mine =
      w.split == 0 && w.head_block == 0 && threadIdx.x / kWarpSize == T::kNumWarps - 1;
  if (p.k_new == nullptr || !mine) return;
  append_row(p.k_new, p.k_new_stride, p.k_cache, p.k_cache_stride, w);
  append_row(p.v_new, p.v_new_stride, p.v_cache, p.v_cache_stride, w);
}

}  // namespace gqa
