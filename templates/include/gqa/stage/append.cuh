// Stage 5, append: the new tokens' K and V into the cache, once per KV head.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include <gqa/stage/row.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

// The new token of this block's KV head, in the registers of a warp.
template <class T>
struct NewToken {
  KeyRow<T> key;
  ValueRow<T> value;
  typename CacheOf<T>::NewRow row;  // where it goes

  CUTE_DEVICE void load(Params const& p, Work<T> const& w) {
    NewTokenOf<T>::load_key(p, w, 0, key);
    NewTokenOf<T>::load_value(p, w, 0, value);
    row.find(p, w, 0);  // behind it, for it may wait for what it reads
  }

  // Writes it to the cache, for which one warp per KV head calls. What this launch reads of these
  // rows it does not use.
  CUTE_DEVICE void append(Params const& p, Work<T> const& w) const {
    if (!row.exists(p)) return;
    key.store(row.key(p, w));
    value.store(row.value(p, w));
  }
};

// Several new tokens, which are in the last tiles of a sequence: a tile's go into it when the
// others have arrived, so that none is read through the cache that this launch writes.
template <class T>
struct NewTokens {
  using Element = typename T::Element;

  CUTE_DEVICE static bool are_in(Work<T> const& w, int tile) {
    return w.appends && (tile + 1) * T::kBlockN > w.num_cached;
  }

  // Whether one of all the sequence's has no place in the cache: then none is written. All lanes
  // take part.
  CUTE_DEVICE static bool any_lost(Params const& p, Work<T> const& w) {
    if constexpr (kMayLoseTokens<T>) {
      bool lost = false;
      for (int i = int(threadIdx.x) % kWarpSize; i < w.new_tokens.count; i += kWarpSize) {
        typename CacheOf<T>::NewRow row;
        row.find(p, w, i);
        lost |= row.lost(p);
      }
      return __any_sync(0xffffffffu, lost);
    } else {
      return false;
    }
  }

  // A tile's keys, then its values, and into the cache if `appends`. All lanes take part.
  CUTE_DEVICE static void put_keys(Params const& p, Work<T> const& w, int tile, Element* keys,
                                   bool appends) {
    put<typename T::KeyTile, KeyRow<T>>(
        p, w, tile, keys, appends,
        [&](int token, KeyRow<T>& row) { NewTokenOf<T>::load_key(p, w, token, row); },
        [&](auto const& place) { return place.key(p, w); });
  }
  CUTE_DEVICE static void put_values(Params const& p, Work<T> const& w, int tile, Element* values,
                                     bool appends) {
    put<typename T::ValueTile, ValueRow<T>>(
        p, w, tile, values, appends,
        [&](int token, ValueRow<T>& row) { NewTokenOf<T>::load_value(p, w, token, row); },
        [&](auto const& place) { return place.value(p, w); });
  }

 private:
  template <class Tile, class Row, class Load, class PlaceOf>
  CUTE_DEVICE static void put(Params const& p, Work<T> const& w, int tile, Element* target,
                              bool appends, Load&& load, PlaceOf&& place_of) {
    constexpr int kBatch = 4;                            // rows on the way at a time
    int const first = tile * T::kBlockN - w.num_cached;  // new token in the tile's first row
    int const end = min(w.new_tokens.count, first + T::kBlockN);
    CUTE_NO_UNROLL
    for (int token = max(first, 0); token < end; token += kBatch) {
      Row row[kBatch];
      CUTE_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (token + i < end) load(token + i, row[i]);
      }
      CUTE_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (token + i >= end) break;
        row[i].template store_to<Tile>(target, token + i - first);
        if (!appends) continue;
        typename CacheOf<T>::NewRow place;
        place.find(p, w, token + i);
        if (place.exists(p)) row[i].store(place_of(place));
      }
    }
    if constexpr (T::kTma) cute::tma_store_fence();  // the copy engine may write there again
    __syncwarp();
  }
};

// What a tile of the cache lacks: several new tokens. All lanes take part.
template <class T, bool one = kOneQuery<T>>
class NewTokensOfTile {
 public:
  using Element = typename T::Element;

  template <class Ring>
  CUTE_DEVICE NewTokensOfTile(Params const& p, Work<T> const& w, int tile, Ring& ring)
      : params_(p), work_(w), tile_(tile), are_there_(NewTokens<T>::are_in(w, tile)) {
    if (!are_there_) return;
    bool const lost = NewTokens<T>::any_lost(p, w);
    if (lost) ring.lose();
    appends_ = !lost && w.head_block == 0;
  }

  CUTE_DEVICE void put_keys(Element* keys) const {
    if (are_there_) NewTokens<T>::put_keys(params_, work_, tile_, keys, appends_);
  }
  CUTE_DEVICE void put_values(Element* values) const {
    if (are_there_) NewTokens<T>::put_values(params_, work_, tile_, values, appends_);
  }

 private:
  Params const& params_;
  Work<T> const& work_;
  int tile_;
  bool are_there_;
  bool appends_ = false;
};

// A single one goes another way.
template <class T>
class NewTokensOfTile<T, true> {
 public:
  template <class Ring>
  CUTE_DEVICE NewTokensOfTile(Params const&, Work<T> const&, int, Ring&) {}
  CUTE_DEVICE void put_keys(typename T::Element*) const {}
  CUTE_DEVICE void put_values(typename T::Element*) const {}
};

}  // namespace gqa
