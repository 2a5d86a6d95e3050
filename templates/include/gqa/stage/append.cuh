// Stage 5, append: the new token's K and V into the cache, bit for bit, once per KV head.
#pragma once

#include <gqa/stage/work.cuh>

namespace gqa {

// One row of one KV head in the registers of a warp.
template <class T>
struct WarpRow {
  static constexpr int kVecs = T::kHeadDim / T::kVecWidth;
  static constexpr int kPerLane = ceil_div(kVecs, kWarpSize);

  Vector<T> vec[kPerLane];

  CUTE_DEVICE void load(typename T::Element const* row) {
    for_each([&](int i, int at) { vec[i] = reinterpret_cast<Vector<T> const*>(row)[at]; });
  }
  CUTE_DEVICE void store(typename T::Element* row) const {
    for_each([&](int i, int at) { reinterpret_cast<Vector<T>*>(row)[at] = vec[i]; });
  }

 private:
  template <class Visit>
  CUTE_DEVICE static void for_each(Visit&& visit) {
    CUTE_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      int const at = i * kWarpSize + int(threadIdx.x) % kWarpSize;
      if (kVecs % kWarpSize == 0 || at < kVecs) visit(i, at);
    }
  }
};

// The new token of this block's KV head, in the registers of a warp.
template <class T>
struct NewToken {
  using Element = typename T::Element;

  WarpRow<T> key, value;

  CUTE_DEVICE void load(Params const& p, Work<T> const& w) {
    key.load(w.template row<Element>(p.k_new, p.k_new_stride));
    value.load(w.template row<Element>(p.v_new, p.v_new_stride));
  }

  // Writes it to the cache, for which one warp per KV head calls. What this launch reads of these
  // rows it does not use.
  CUTE_DEVICE void append(Params const& p, Work<T> const& w) const {
    key.store(cache_row(p.k_cache, p.k_cache_stride, w));
    value.store(cache_row(p.v_cache, p.v_cache_stride, w));
  }

 private:
  CUTE_DEVICE static Element* cache_row(void* base, CacheStrides const& stride, Work<T> const& w) {
    return static_cast<Element*>(base) + w.batch * stride.batch + w.num_cached * stride.token +
           w.kv_head * stride.head;
  }
};

}  // namespace gqa
