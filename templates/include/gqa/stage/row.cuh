// A row of one KV head in the registers of a warp.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

// Lanes take vectors in turn.
template <class T, int kDims>
struct WarpRow {
  static constexpr int kVecs = kDims / T::kVecWidth;
  static constexpr int kPerLane = ceil_div(kVecs, kWarpSize);

  Vector<T> vec[kPerLane];

  CUTE_DEVICE void load(typename T::Element const* row) {
    for_each([&](int i, int at) { vec[i] = reinterpret_cast<Vector<T> const*>(row)[at]; });
  }
  CUTE_DEVICE void store(typename T::Element* row) const {
    for_each([&](int i, int at) { reinterpret_cast<Vector<T>*>(row)[at] = vec[i]; });
  }

 protected:
  template <class Visit>
  CUTE_DEVICE static void for_each(Visit&& visit) {
    CUTE_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      int const at = i * kWarpSize + int(threadIdx.x) % kWarpSize;
      if (kVecs % kWarpSize == 0 || at < kVecs) visit(i, at);
    }
  }
};

template <class T>
using KeyRow = typename OperandsOf<T>::template TokenRow<T::kHeadDim>;
template <class T>
using ValueRow = typename OperandsOf<T>::template TokenRow<T::kHeadDimV>;

}  // namespace gqa
