// Stage 1, load: rows of the KV cache into a warp's tiles in shared memory.
//
// Every warp owns kNumStages slots for K and as many for V and fills them with cp.async, so no warp
// ever waits for another one. The new token is never read through the cache that this very launch
// writes: its row of a tile is put there when the tile has arrived. Rows that are not seen, past
// the end of the cached tokens for one, are not read but filled with zeros (their probability is
// zero, and zero times NaN would not be).
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include <gqa/arch/ptx.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

// Copies one vector to shared memory, or zeros where there is nothing to read.
template <bool kFetchesLine, class Vec>
CUTE_DEVICE void copy_or_zero(Vec const* source, Vec* target, bool exists, uint64_t policy) {
  if constexpr (sizeof(Vec) >= 4) {
    copy_async<kFetchesLine>(source, target, exists, policy);
  } else {
    *target = exists ? *source : Vec(0);  // cp.async moves no less than four bytes
  }
}

// The rows of one KV head of one sequence, in K or in V.
template <class T, class Tile>
struct RowSource {
  typename CacheOf<T>::Rows row;
  uint64_t policy;

  CUTE_DEVICE explicit RowSource(typename CacheOf<T>::Rows const& rows)
      : row(rows), policy(evict_first_policy()) {}

  // Brings the rows of a tile before `end` to L2. All lanes take part.
  CUTE_DEVICE void prefetch_tile(int tile, int end) const {
    constexpr int kRowBytes = Tile::kDims * int(sizeof(typename T::Stored));
    int const token = tile * T::kBlockN + int(threadIdx.x) % kWarpSize;
    if (token < (tile + 1) * T::kBlockN && token < end) {
      prefetch_to_l2(row(token), kRowBytes);
    }
  }

  // Copies a tile: rows from `first` to `end`, and zeros in place of others. All lanes take part,
  // to the end if they tell each other where rows are.
  //
  // Every instruction of the warp copies whole rows, as many as fit into it, and the last lanes
  // idle where head_dim is no power of two: rows cut in two would ask for the same lines twice.
  CUTE_DEVICE void copy_tile(typename CacheOf<T>::Pages const& pages, int tile, int first, int end,
                             typename T::Stored* target) const {
    constexpr int kRowBytes = Tile::kDims * int(sizeof(typename T::Stored));
    constexpr bool kSharesLine = kRowBytes < 128 && 128 % kRowBytes == 0;
    constexpr int kVecs = Tile::kDims / T::kVecWidth;
    constexpr int kLanes = kVecs < kWarpSize ? kVecs : kWarpSize;  // lanes per row
    constexpr int kRows = kWarpSize / kLanes;
    int const lane = threadIdx.x % kWarpSize;
    constexpr bool kAlone = CacheOf<T>::by_number();
    bool const idles = kRows * kLanes < kWarpSize && lane >= kRows * kLanes;
    if (kAlone && idles) return;
    auto const place_of = row.of_tile(pages, tile, first, end);
    _Pragma("unroll 8")
    for (int i = 0; i < ceil_div(T::kBlockN, kRows); ++i) {
      int const at = i * kRows + lane / kLanes;
      bool const ends = T::kBlockN % kRows != 0 && at >= T::kBlockN;
      if (kAlone && ends) return;
      auto const place = place_of(at);
      if (idles || ends) continue;
      CUTE_UNROLL
      for (int dim = lane % kLanes * T::kVecWidth; dim < Tile::kDims;
           dim += kLanes * T::kVecWidth) {
        copy_or_zero<kSharesLine>(
            reinterpret_cast<Vector<T> const*>(place.row + dim),
            reinterpret_cast<Vector<T>*>(target + typename Tile::Layout{}(at, dim)), place.exists,
            policy);
      }
    }
  }
};

// The slots of one warp. Loads are committed in the order K0 V0 K1 V1 ..., and a slot is filled
// again as soon as it has been read; hence, whenever a tile is needed, exactly 2 * kNumStages - 1
// younger groups are in flight.
template <class T>
class TileRing {
 public:
  using Element = typename T::Stored;
  using KeyTile = typename T::KeyTile;
  using ValueTile = typename T::ValueTile;

  CUTE_DEVICE TileRing(Params const& p, unsigned char* storage, int first_tile)
      : keys_(CacheOf<T>::keys(p, blockIdx.z)),
        values_(CacheOf<T>::values(p, blockIdx.z)),
        pages_(p),
        slots_(reinterpret_cast<Element*>(storage)),
        prefetch_first_tile_(kKnowsTiles<T> && first_tile * T::kBlockN < p.prefetch_limit) {
    clear_padding<KeyTile>(key_slot(0));
    clear_padding<ValueTile>(value_slot(0));
  }

  // Brings the first tile to L2, before it may be read, if the launch allows to ask for it early.
  CUTE_DEVICE void prefetch(Params const& p, int first_tile) const {
    if constexpr (kKnowsTiles<T> && T::kVecWidth * sizeof(Element) == 16) {
      if (!prefetch_first_tile_) return;
      keys_.prefetch_tile(first_tile, p.prefetch_limit);
      values_.prefetch_tile(first_tile, p.prefetch_limit);
    }
  }

  // Asks for the first tile before the length of the sequence is known, if the launch allows it:
  // the latency of memory is most of a short decode step. Rows past the sequence's end are then
  // read as the cache has them.
  CUTE_DEVICE void start(Params const& p, int first_tile) {
    if (prefetch_first_tile_) load_both(first_tile, p.prefetch_limit, 0);
    pages_.ask(first_tile);
  }

  // Asks for the other tiles that have a slot.
  CUTE_DEVICE void fill(Params const& p, Work<T> const& w, int first_tile) {
    pages_.open(w, first_tile);
    if (!prefetch_first_tile_) {
      keys_ =
          RowSource<T, KeyTile>(CacheOf<T>::keys(p, w.cache_row()));  // which balancing may change
      values_ = RowSource<T, ValueTile>(CacheOf<T>::values(p, w.cache_row()));
      load_both_if(first_tile, w, 0);
    }
    CUTE_UNROLL
    for (int stage = 1; stage < T::kNumStages; ++stage) {
      load_both_if(first_tile + stage * w.tile_step(), w, stage);
    }
  }

  // Waits for all that was asked for, needed or not.
  CUTE_DEVICE static void drain() {
    cute::cp_async_wait<0>();
    __syncwarp();
  }

  // The K tile (then the V tile) at the head of the ring, complete and visible to the whole warp.
  CUTE_DEVICE Element* wait_keys() const {
    wait();
    return key_slot(stage_);
  }
  CUTE_DEVICE Element* wait_values() const {
    wait();
    return value_slot(stage_);
  }

  // The tile at the head has been read: its slot takes the tile that comes kNumStages later.
  CUTE_DEVICE void refill_keys(Work<T> const& w, int tile) {
    __syncwarp();
    int const next = tile + T::kNumStages * w.tile_step();
    pages_.turn_to(w, next);
    load_if(keys_, next, w, key_slot(stage_));
  }
  CUTE_DEVICE void refill_values(Work<T> const& w, int tile) {
    __syncwarp();
    load_if(values_, tile + T::kNumStages * w.tile_step(), w, value_slot(stage_));
    stage_ = stage_ + 1 == T::kNumStages ? 0 : stage_ + 1;
  }

  // Whether a tile, or the new token, has no place in the cache.
  CUTE_DEVICE bool lost() const { return pages_.lost(); }
  CUTE_DEVICE void lose() { pages_.lose(); }

 private:
  CUTE_DEVICE void load_both(int tile, int end, int stage) {
    keys_.copy_tile(pages_, tile, 0, end, key_slot(stage));
    cute::cp_async_fence();
    values_.copy_tile(pages_, tile, 0, end, value_slot(stage));
    cute::cp_async_fence();
  }
  CUTE_DEVICE void load_both_if(int tile, Work<T> const& w, int stage) {
    pages_.turn_to(w, tile);
    load_if(keys_, tile, w, key_slot(stage));
    load_if(values_, tile, w, value_slot(stage));
  }

  // Copies a tile if there is one, and commits it as one group of cp.async.
  template <class Tile>
  CUTE_DEVICE void load_if(RowSource<T, Tile> const& rows, int tile, Work<T> const& w,
                           Element* slot) const {
    if (tile < w.num_tiles) rows.copy_tile(pages_, tile, w.first_token, w.num_cached, slot);
    cute::cp_async_fence();
  }

  CUTE_DEVICE static void wait() {
    cute::cp_async_wait<2 * T::kNumStages - 1>();
    __syncwarp();
  }
  CUTE_DEVICE Element* key_slot(int stage) const { return slots_ + stage * T::kPairElements; }
  CUTE_DEVICE Element* value_slot(int stage) const { return key_slot(stage) + KeyTile::kElements; }

  // The MMA reads kDimsPadded columns. Those that no load fills must not hold NaN in K; in V their
  // products are dropped. `slot` is that of the first stage.
  template <class Tile>
  CUTE_DEVICE static void clear_padding(Element* slot) {
    if constexpr (Tile::kDims != Tile::kDimsPadded) {
      constexpr bool kWhole = Tile::kDims % kChunk == 0;
      using Vec = cute::conditional_t<kWhole, cute::uint128_t, uint64_t>;
      for (int row = int(threadIdx.x) % kWarpSize; row < T::kNumStages * T::kBlockN;
           row += kWarpSize) {
        Element* tile = slot + row / T::kBlockN * T::kPairElements;
        CUTE_UNROLL
        for (int dim = Tile::kDims; dim < Tile::kDimsPadded; dim += sizeof(Vec) / sizeof(Element)) {
          *reinterpret_cast<Vec*>(tile + typename Tile::Layout{}(row % T::kBlockN, dim)) = Vec(0);
        }
      }
    }
  }

  RowSource<T, KeyTile> keys_;
  RowSource<T, ValueTile> values_;
  typename CacheOf<T>::Pages pages_;
  Element* slots_;
  bool const prefetch_first_tile_;  // the first tile has been asked for before the length was known
  int stage_ = 0;
};

// Clears the rows of a V tile from `first` on. All lanes take part.
template <class T>
CUTE_DEVICE void clear_value_rows(typename T::Stored* tile, int first) {
  constexpr int kChunks = T::ValueTile::kDimsPadded / kChunk;
  CUTE_NO_UNROLL
  for (int i = first * kChunks + int(threadIdx.x) % kWarpSize; i < T::kBlockN * kChunks;
       i += kWarpSize) {
    *reinterpret_cast<cute::uint128_t*>(
        tile + typename T::ValueTile::Layout{}(i / kChunks, i % kChunks * kChunk)) =
        cute::uint128_t(0);
  }
}

}  // namespace gqa
