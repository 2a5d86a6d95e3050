// Stage 1, load: rows of the KV cache into a warp's tiles in shared memory.
//
// Every warp owns kNumStages slots for K and as many for V and fills them with cp.async, so no warp
// ever waits for another one. The row at position `num_cached` is the new token: it is read from
// the k and v arguments, never through the cache that this very launch writes. Rows past the end
// are filled with zeros (their probability is zero, and zero times NaN would not be).
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "ptx.cuh"
#include "work.cuh"

namespace gqa {

// Copies one vector to shared memory, or zeros where there is nothing to read.
template <class Vec>
CUTE_DEVICE void copy_or_zero(Vec const* source, Vec* target, bool exists, uint64_t policy) {
  if constexpr (sizeof(Vec) >= 4) {
    copy_async(source, target, exists, policy);
  } else {
    *target = exists ? *source : Vec(0);  // cp.async moves no less than four bytes
  }
}

// The rows of one KV head of one sequence, in K or in V.
template <class T>
struct RowSource {
  typename T::Element const* cache;
  typename T::Element const* new_token;
  int64_t stride;
  uint64_t policy;

  CUTE_DEVICE static RowSource keys(Params const& p, Work<T> const& w) {
    return RowSource(p.k_cache, p.k_cache_stride, p.k_new, p.k_new_stride, w);
  }
  CUTE_DEVICE static RowSource values(Params const& p, Work<T> const& w) {
    return RowSource(p.v_cache, p.v_cache_stride, p.v_new, p.v_new_stride, w);
  }

  // Copies one tile and commits it as one group of cp.async. All lanes take part.
  CUTE_DEVICE void load_tile(int tile, Work<T> const& w, typename T::Element* target) const {
    if (tile < w.num_tiles) copy_rows(tile * T::kBlockN, w, target);
    cute::cp_async_fence();
  }

 private:
  // Every instruction of the warp copies whole rows, as many as fit into it, and the last lanes
  // idle where head_dim is no power of two: rows cut in two would ask for the same lines twice.
  CUTE_DEVICE void copy_rows(int first_token, Work<T> const& w, typename T::Element* target) const {
    constexpr int kVecs = T::kHeadDim / T::kVecWidth;
    constexpr int kLanes = kVecs < kWarpSize ? kVecs : kWarpSize;  // lanes per row
    constexpr int kRows = kWarpSize / kLanes;
    int const lane = threadIdx.x % kWarpSize;
    if (kRows * kLanes < kWarpSize && lane >= kRows * kLanes) return;
    _Pragma("unroll 8")
    for (int i = 0; i < ceil_div(T::kBlockN, kRows); ++i) {
      int const row = i * kRows + lane / kLanes;
      if (T::kBlockN % kRows != 0 && row >= T::kBlockN) return;
      int const token = first_token + row;
      auto const* source = token < w.num_cached ? cache + token * stride : new_token;
      CUTE_UNROLL
      for (int dim = lane % kLanes * T::kVecWidth; dim < T::kHeadDim;
           dim += kLanes * T::kVecWidth) {
        copy_or_zero(reinterpret_cast<Vector<T> const*>(source + dim),
                     reinterpret_cast<Vector<T>*>(target + typename T::TileLayout{}(row, dim)),
                     token < w.num_tokens, policy);
      }
    }
  }

  CUTE_DEVICE RowSource(void const* cache_base, CacheStrides cache_stride, void const* new_base,
                        RowStrides new_stride, Work<T> const& w)
      : cache(static_cast<typename T::Element const*>(cache_base) + w.batch * cache_stride.batch +
              w.kv_head * cache_stride.head),
        new_token(new_base == nullptr ? cache  // never read: num_cached == num_tokens
                                      : w.template row<typename T::Element>(new_base, new_stride)),
        stride(cache_stride.token),
        policy(evict_first_policy()) {}
};

// The slots of one warp. Loads are committed in the order K0 V0 K1 V1 ..., and a slot is filled
// again as soon as it has been read; hence, whenever a tile is needed, exactly 2 * kNumStages - 1
// younger groups are in flight.
template <class T>
class TileRing {
 public:
  using Element = typename T::Element;

  CUTE_DEVICE TileRing(Params const& p, Work<T> const& w, unsigned char* storage)
      : work_(w),
        keys_(RowSource<T>::keys(p, w)),
        values_(RowSource<T>::values(p, w)),
        slots_(reinterpret_cast<Element*>(storage)) {
    if constexpr (T::kHeadDim != T::kHeadDimPadded) clear_padding();
  }

  CUTE_DEVICE void fill(int first_tile) {
    CUTE_UNROLL
    for (int stage = 0; stage < T::kNumStages; ++stage) {
      keys_.load_tile(first_tile + stage * work_.tile_step(), work_, key_slot(stage));
      values_.load_tile(first_tile + stage * work_.tile_step(), work_, value_slot(stage));
    }
  }

  // The K tile (then the V tile) at the head of the ring, complete and visible to the whole warp.
  CUTE_DEVICE Element const* wait_keys() {
    wait();
    return key_slot(stage_);
  }
  CUTE_DEVICE Element const* wait_values() {
    wait();
    return value_slot(stage_);
  }

  // The tile at the head has been read: its slot takes the tile that comes kNumStages later.
  CUTE_DEVICE void refill_keys(int tile) {
    __syncwarp();
    keys_.load_tile(tile + T::kNumStages * work_.tile_step(), work_, key_slot(stage_));
  }
  CUTE_DEVICE void refill_values(int tile) {
    __syncwarp();
    values_.load_tile(tile + T::kNumStages * work_.tile_step(), work_, value_slot(stage_));
    stage_ = stage_ + 1 == T::kNumStages ? 0 : stage_ + 1;
  }

 private:
  CUTE_DEVICE void wait() {
    cute::cp_async_wait<2 * T::kNumStages - 1>();
    __syncwarp();
  }
  CUTE_DEVICE Element* key_slot(int stage) { return slots_ + 2 * stage * T::kTileElements; }
  CUTE_DEVICE Element* value_slot(int stage) { return slots_ + (2 * stage + 1) * T::kTileElements; }

  // The MMA reads kHeadDimPadded columns. Those that no load fills must not hold NaN in K; in V
  // their products are dropped.
  CUTE_DEVICE void clear_padding() {
    for (int row = int(threadIdx.x) % kWarpSize; row < 2 * T::kNumStages * T::kBlockN;
         row += kWarpSize) {
      Element* slot = slots_ + row / T::kBlockN * T::kTileElements;
      *reinterpret_cast<cute::uint128_t*>(
          slot + typename T::TileLayout{}(row % T::kBlockN, T::kHeadDim)) = cute::uint128_t(0);
    }
  }

  Work<T> const& work_;
  RowSource<T> keys_;
  RowSource<T> values_;
  Element* slots_;
  int stage_ = 0;
};

}  // namespace gqa
