// A row of one KV head in the registers of a warp.
#pragma once

#include <gqa/arch/tile.cuh>
#include <gqa/traits.cuh>

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
  // Of what `element_at` makes of a dim.
  template <class ElementAt>
  CUTE_DEVICE void make(ElementAt&& element_at) {
    for_each([&](int i, int at) {
      alignas(16) typename T::Element elements[T::kVecWidth];
      CUTE_UNROLL
      for (int e = 0; e < T::kVecWidth; ++e) elements[e] = element_at(at * T::kVecWidth + e);
      vec[i] = reinterpret_cast<Vector<T> const&>(elements);
    });
  }
  CUTE_DEVICE void store(typename T::Element* row) const {
    for_each([&](int i, int at) { reinterpret_cast<Vector<T>*>(row)[at] = vec[i]; });
  }
  // Into the row of a tile.
  template <class Tile>
  CUTE_DEVICE void store_to(typename T::Element* tile, int row) const {
    if constexpr (T::kTma) {  // vectors are chunks
      for_each([&](int i, int at) {
        TileRow<T, Tile> const chunks(tile, row, at % 2);
        const_cast<cute::uint128_t&>(chunks[at / 2]) = vec[i];
      });
    } else {
      store(tile + typename Tile::Layout{}(row, 0));
    }
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

template <class T>
using KeyRow = WarpRow<T, T::kHeadDim>;
template <class T>
using ValueRow = WarpRow<T, T::kHeadDimV>;

}  // namespace gqa
