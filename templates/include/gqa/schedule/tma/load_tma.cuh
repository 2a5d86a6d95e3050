// Stage 1, load, by the copy engine: boxes of the KV cache into a warp's tiles in shared memory.
//
// One lane asks for a tile; a barrier in shared memory counts its bytes. Dims past head_dim and
// tokens past the end of the cache are zeros and cost no reads. Tokens between the end of the
// sequence and that of the cache, and those of the first tile that the mask hides, are read as they
// are, NaN perhaps: their scores are masked, and their rows of V are cleared before they are used.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include <gqa/arch/ptx_sm90.cuh>
#include <gqa/schedule/tma/storage_tma.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

// The slots of one warp: K and V of num_stages tiles. A slot is filled again as soon as the warp
// has read it. Calls as for TileRing.
template <class T>
class TmaRing {
 public:
  using Element = typename T::Stored;
  using KeyTile = typename T::KeyTile;
  using ValueTile = typename T::ValueTile;
  using Boxes = typename CacheOf<T>::Boxes;

  // Initialises the barriers. The maps, which are not in any cache, are fetched while the length
  // is: 0.2 us less at 16/8/256, 1 x 1024. A tile that is asked for at once fetches them itself.
  CUTE_DEVICE TmaRing(TmaParams const& p, ClusterStorage<T>& shared, int warp, int first_tile)
      : params_(p),
        shared_(shared),
        boxes_(p.decode),
        warp_(warp),
        leader_(threadIdx.x % kWarpSize == 0),
        prefetch_first_tile_(kKnowsTiles<T> && first_tile * T::kBlockN < p.decode.prefetch_limit) {
    if constexpr (!T::kPdl) boxes_.ask(first_tile);  // as early as it may
    if (threadIdx.x == 0 && !prefetch_first_tile_) {
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&p.keys));
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&p.values));
    }
    if (leader_) {
      CUTE_NO_UNROLL
      for (int stage = 0; stage < p.decode.num_stages; ++stage) {
        barrier_init(keys_barrier(stage));
        barrier_init(values_barrier(stage));
      }
      barrier_init_fence();
    }
    __syncwarp();
  }

  // Brings the first tile to L2, before it may be read, if the launch allows to ask for it early.
  CUTE_DEVICE void prefetch(int first_tile) const {
    if constexpr (kKnowsTiles<T>) {
      if (!prefetch_first_tile_ || !leader_) return;
      prefetch<KeyTile>(params_.keys, first_tile);
      prefetch<ValueTile>(params_.values, first_tile);
    }
  }

  // Asks for the first tile before the length of the sequence is known, if the launch allows it:
  // the latency of memory is most of a short decode step.
  CUTE_DEVICE void start(int first_tile) {
    if (prefetch_first_tile_) load_both(first_tile, 0);
    if constexpr (T::kPdl) boxes_.ask(first_tile);
  }

  // Asks for the other tiles that have a slot.
  CUTE_DEVICE void fill(Work<T> const& w, int first_tile) {
    if constexpr (kHasOtherRow) row_ = w.cache_row();
    boxes_.open(w, first_tile);
    CUTE_NO_UNROLL
    for (int stage = prefetch_first_tile_; stage < params_.decode.num_stages; ++stage) {
      int const tile = first_tile + stage * w.tile_step();
      if (tile < w.num_tiles) {
        boxes_.turn_to(w, tile);
        load_both(tile, stage);
      }
    }
  }

  // Waits for a first tile that turned out not to be needed. A block must not leave before.
  CUTE_DEVICE void drain() {
    if (!prefetch_first_tile_) return;
    barrier_wait(keys_barrier(0), 0);
    barrier_wait(values_barrier(0), 0);
  }

  // The K tile (then the V tile) at the head of the ring, complete and visible to the whole warp.
  CUTE_DEVICE Element* wait_keys() {
    barrier_wait(keys_barrier(stage_), parity_);
    return shared_.key_slot(stage_, warp_);
  }
  CUTE_DEVICE Element* wait_values() {
    barrier_wait(values_barrier(stage_), parity_);
    return shared_.value_slot(stage_, warp_);
  }

  // The tile at the head has been read: its slot takes the tile that comes num_stages later.
  CUTE_DEVICE void refill_keys(Work<T> const& w, int tile) {
    __syncwarp();
    int const next = tile + params_.decode.num_stages * w.tile_step();
    if (next < w.num_tiles) {
      boxes_.turn_to(w, next);
      load<KeyTile>(params_.keys, next, shared_.key_slot(stage_, warp_), keys_barrier(stage_));
    }
  }
  CUTE_DEVICE void refill_values(Work<T> const& w, int tile) {
    __syncwarp();
    int const next = tile + params_.decode.num_stages * w.tile_step();
    if (next < w.num_tiles) {
      load<ValueTile>(params_.values, next, shared_.value_slot(stage_, warp_),
                      values_barrier(stage_));
    }
    if (++stage_ == params_.decode.num_stages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

  // Whether a tile, or the new token, has no place in the cache.
  CUTE_DEVICE bool lost() const { return boxes_.lost(); }
  CUTE_DEVICE void lose() { boxes_.lose(); }

 private:
  static constexpr bool kHasOtherRow = CacheOf<T>::by_number() && !RowOf<T>::is_own();

  CUTE_DEVICE uint64_t& keys_barrier(int stage) { return shared_.ring_barrier[stage][warp_][0]; }
  CUTE_DEVICE uint64_t& values_barrier(int stage) { return shared_.ring_barrier[stage][warp_][1]; }

  CUTE_DEVICE void load_both(int tile, int stage) {
    load<KeyTile>(params_.keys, tile, shared_.key_slot(stage, warp_), keys_barrier(stage));
    load<ValueTile>(params_.values, tile, shared_.value_slot(stage, warp_), values_barrier(stage));
  }

  template <class Tile>
  CUTE_DEVICE void load(TensorMap const& map, int tile, Element* slot, uint64_t& barrier) const {
    if (!leader_) return;
    barrier_arrive_expect(barrier, Tile::kElements * int(sizeof(Element)));
    CUTE_UNROLL
    for (int part = 0; part < T::kBlockN / Boxes::kTokens; ++part) {
      Box at = boxes_.at(tile, part);
      if constexpr (kHasOtherRow) at.sequence = row_;
      copy<Tile>(map, at, slot + part * Boxes::kTokens * kBoxDims, barrier);
    }
  }

  template <class Tile>
  CUTE_DEVICE static void copy(TensorMap const& map, Box at, Element* slot, uint64_t& barrier) {
    auto const hint = uint64_t(cute::TMA::CacheHintSm90::EVICT_FIRST);
    if constexpr (Tile::kDims % kBoxDims == 0) {
      cute::SM90_TMA_LOAD_5D::copy(&map, &barrier, hint, slot, 0, at.token, 0, at.head,
                                   at.sequence);
    } else {
      CUTE_UNROLL
      for (int box = 0; box < Tile::kBoxes; ++box) {
        cute::SM90_TMA_LOAD_4D::copy(&map, &barrier, hint, slot + box * T::kBlockN * kBoxDims,
                                     box * kBoxDims, at.token, at.head, at.sequence);
      }
    }
  }

  template <class Tile>
  CUTE_DEVICE void prefetch(TensorMap const& map, int tile) const {
    Box const at = boxes_.at(tile, 0);
    if constexpr (Tile::kDims % kBoxDims == 0) {
      using Prefetch = cute::SM90_TMA_LOAD_5D::PREFETCH;
      Prefetch::copy(&map, 0, at.token, 0, at.head, at.sequence);
    } else {
      using Prefetch = cute::SM90_TMA_LOAD_4D::PREFETCH;
      CUTE_UNROLL
      for (int box = 0; box < Tile::kBoxes; ++box) {
        Prefetch::copy(&map, box * kBoxDims, at.token, at.head, at.sequence);
      }
    }
  }

  TmaParams const& params_;
  ClusterStorage<T>& shared_;
  int const warp_;
  bool const leader_;
  int row_;  // of the cache, where it is not that of the sequence's number
  Boxes boxes_;
  bool const prefetch_first_tile_;  // the first tile has been asked for before the length was known
  int stage_ = 0;
  uint32_t parity_ = 0;
};

// Clears the rows of a V tile from `first` to `end`. All lanes take part.
template <class T>
CUTE_DEVICE void clear_rows(typename T::Stored* values, int first, int end = T::kBlockN) {
  constexpr int kChunks = T::kBoxRowBytes / 16;
  int const lane = threadIdx.x % kWarpSize;
  CUTE_NO_UNROLL
  for (int box = 0; box < T::ValueTile::kBoxes; ++box) {
    auto* rows = reinterpret_cast<cute::uint128_t*>(values + box * T::kBlockN * kBoxDims);
    CUTE_NO_UNROLL
    for (int i = first * kChunks + lane; i < end * kChunks; i += kWarpSize) {
      rows[i] = cute::uint128_t(0);
    }
  }
}

// Clears the rows of a V tile that lie before all that is seen, if there are any. The copy engine
// may write to the same slot again. All lanes take part.
template <class T>
CUTE_DEVICE void clear_hidden_rows(Work<T> const& w, int tile, typename T::Stored* values) {
  if constexpr (!kSeesFirstToken<T>) {
    int const first = min(w.first_token, w.tokens_in_tiles()) - tile * T::kBlockN;
    if (first <= 0) return;
    clear_rows<T>(values, 0, min(first, T::kBlockN));
    cute::tma_store_fence();
    __syncwarp();
  }
}

}  // namespace gqa
