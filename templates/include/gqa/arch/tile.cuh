// How a tile of K or V lies in shared memory, and where ldmatrix finds its rows.
//
// ldmatrix reads 8x8 matrices, eight rows of 16 bytes (a chunk), which should fall into different
// banks. cp.async puts rows an odd number of chunks apart. The copy engine writes boxes of 64 dims,
// whose rows are 128 bytes apart, and swizzles them: within a row it XORs the number of the chunk
// with that of the row, modulo 8.
#pragma once

#include <cute/arch/util.hpp>
#include <cute/swizzle.hpp>

#include <gqa/traits.cuh>

namespace gqa {

// The chunks of one row that a lane reads: chunk, chunk + 2, chunk + 4, ...
template <class T, class Tile, bool tma = T::kTma>
class TileRow;

template <class T, class Tile>
class TileRow<T, Tile, false> {
 public:
  CUTE_DEVICE TileRow(typename T::Stored const* tile, int row, int chunk)
      : first_(tile + typename Tile::Layout{}(row, chunk * kChunk)) {}

  CUTE_DEVICE cute::uint128_t const& operator[](int i) const {
    return *reinterpret_cast<cute::uint128_t const*>(first_ + 2 * i * kChunk);
  }

 private:
  typename T::Stored const* first_;
};

// Tiles are aligned to the period of the swizzle, 1024 bytes. A lane's chunks are even or odd
// alike, so the step of 2 * i never carries and can be XORed into the swizzled address.
template <class T, class Tile>
class TileRow<T, Tile, true> {
 public:
  CUTE_DEVICE TileRow(typename T::Stored const* tile, int row, int chunk)
      : first_(cute::cast_smem_ptr_to_uint(tile) +
               Swizzle{}(row * T::kBoxRowBytes + chunk % 8 * 16)) {}

  CUTE_DEVICE cute::uint128_t const& operator[](int i) const {
    constexpr int kStepsPerBox = kBoxDims / (2 * kChunk);
    uint32_t const address = (first_ ^ (i % kStepsPerBox * 32)) + i / kStepsPerBox * T::kBoxBytes;
    return *static_cast<cute::uint128_t const*>(__cvta_shared_to_generic(address));
  }

 private:
  using Swizzle = cute::Swizzle<3, 4, 3>;

  uint32_t first_;
};

}  // namespace gqa
