// A row of one KV head in the registers of a warp.
#pragma once

#include <gqa/arch/tile.cuh>
#include <gqa/policy/slots.cuh>

namespace gqa {

// Where what is stored of a tile's row is: a dim, or a pair of them.
template <class T, class Tile>
CUTE_DEVICE typename T::Stored* place_in_tile(typename T::Stored* tile, int row, int at) {
  if constexpr (T::kTma) {
    int const chunk = at / kChunk;
    TileRow<T, Tile> const chunks(tile, row, chunk % 2);
    auto const* found = reinterpret_cast<typename T::Stored const*>(&chunks[chunk / 2]);
    return const_cast<typename T::Stored*>(found) + at % kChunk;
  } else {
    return tile + typename Tile::Layout{}(row, at);
  }
}

// Lanes take vectors in turn, the first of them kFirstLane.
template <class T, int kDims, int kFirstLane = 0>
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
  // Into the row of a tile.
  template <class Tile>
  CUTE_DEVICE void store_to(typename T::Element* tile, int row) const {
    for_each([&](int i, int at) {
      auto* place = place_in_tile<T, Tile>(tile, row, at * T::kVecWidth);
      *reinterpret_cast<Vector<T>*>(place) = vec[i];
    });
  }

 protected:
  template <class Visit>
  CUTE_DEVICE static void for_each(Visit&& visit) {
    CUTE_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      int const at = i * kWarpSize + (int(threadIdx.x) % kWarpSize ^ kFirstLane);
      if (kVecs % kWarpSize == 0 || at < kVecs) visit(i, at);
    }
  }
};

}  // namespace gqa
