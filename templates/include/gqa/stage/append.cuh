// Stage 5, append: the new tokens' K and V into the cache, as it stores them, once per KV head.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include <gqa/stage/prepare.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

// The new token of this block's KV head, in the registers of a warp.
template <class T>
struct NewToken {
  KeyRow<T> key;
  ValueRow<T> value;
  typename CacheOf<T>::NewRow row;  // where it goes
  typename OperandsOf<T>::NewScales scales;

  // A key that is prepared is waited for.
  CUTE_DEVICE void load(Params const& p, Work<T> const& w) {
    scales.load(p, w);
    NewTokenOf<T>::load_key(p, w, 0, key);
    NewTokenOf<T>::load_value(p, w, 0, value);
    row.find(p, w, 0);  // behind it, for it may wait for what it reads
  }
  // Once, when it is there.
  CUTE_DEVICE void quantise() { OperandsOf<T>::quantise(scales, key, value); }

  // Writes it to the cache, for which one warp per KV head calls. What this launch reads of these
  // rows it does not use.
  CUTE_DEVICE void append(Params const& p, Work<T> const& w) const {
    if (!row.exists(p)) return;
    key.store(row.key(p, w));
    value.store(row.value(p, w));
  }
};

// Whether a single one is asked for before queries are waited for: it would come late behind them.
template <class T>
constexpr bool kTokenAhead =
    kOneQuery<T> && (kPreparesRows<T> || OperandsOf<T>::KeyScale::kNarrows);

// It, then, of the warp that has a sequence's last tile.
template <class T, bool ahead = kTokenAhead<T>>
class TokenAhead {
 public:
  CUTE_DEVICE void load(Params const& p, Work<T> const& w, int warp) {
    bool const has_last = (w.num_tiles - 1 - w.first_tile(warp)) % w.tile_step() == 0;
    if (w.appends && has_last) token_.load(p, w);
  }
  CUTE_DEVICE NewToken<T> const& token() const { return token_; }

 private:
  NewToken<T> token_ = {};
};
template <class T>
class TokenAhead<T, false> {
 public:
  CUTE_DEVICE void load(Params const&, Work<T> const&, int) {}
};

// Several new tokens, which are in the last tiles of a sequence: a tile's go into it when the
// others have arrived, so that none is read through the cache that this launch writes.
template <class T>
struct NewTokens {
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
};

// What a tile of the cache lacks: several new tokens. They are asked for before the tile is waited
// for, the first ones at least. All lanes take part.
template <class T, bool one = kOneQuery<T>>
class NewTokensOfTile {
 public:
  using Stored = typename T::Stored;

  template <class Ring>
  CUTE_DEVICE NewTokensOfTile(Params const& p, Work<T> const& w, int tile, Ring& ring)
      : params_(p),
        work_(w),
        first_(tile * T::kBlockN - w.num_cached),
        end_(NewTokens<T>::are_in(w, tile) ? min(w.new_tokens.count, first_ + T::kBlockN) : 0) {
    if (end_ == 0) return;
    load_keys(max(first_, 0), keys_);
    load_values(max(first_, 0), values_);
    bool const lost = NewTokens<T>::any_lost(p, w);
    if (lost) ring.lose();
    appends_ = !lost && w.head_block == 0;
  }

  // Into the tile's keys, then into its values, and into the cache where this block appends.
  CUTE_DEVICE void put_keys(Stored* tile) {
    put<typename T::KeyTile>(
        tile, keys_, [&](int token, auto& rows) { load_keys(token, rows); },
        [&](auto& row) { OperandsOf<T>::quantise_key(params_, work_, row); },
        [&](auto const& place) { return place.key(params_, work_); });
  }
  CUTE_DEVICE void put_values(Stored* tile) {
    put<typename T::ValueTile>(
        tile, values_, [&](int token, auto& rows) { load_values(token, rows); },
        [&](auto& row) { OperandsOf<T>::quantise_value(params_, work_, row); },
        [&](auto const& place) { return place.value(params_, work_); });
  }

 private:
  // Rows on the way at a time, as registers allow.
  static constexpr int kBatch = T::kHeadDim > 192 ? 1 : T::kBlockH > 8 && !kPreparesRows<T> ? 4 : 2;

  CUTE_DEVICE void load_keys(int token, KeyRow<T> (&rows)[kBatch]) const {
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (token + i < end_) NewTokenOf<T>::load_key(params_, work_, token + i, rows[i]);
    }
  }
  CUTE_DEVICE void load_values(int token, ValueRow<T> (&rows)[kBatch]) const {
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (token + i < end_) NewTokenOf<T>::load_value(params_, work_, token + i, rows[i]);
    }
  }

  template <class Tile, class Row, class Load, class Quantise, class PlaceOf>
  CUTE_DEVICE void put(Stored* tile, Row (&rows)[kBatch], Load&& load, Quantise&& quantise,
                       PlaceOf&& place_of) {
    if (end_ == 0) return;
    CUTE_NO_UNROLL
    for (int token = max(first_, 0); token < end_; token += kBatch) {
      if (token != max(first_, 0)) load(token, rows);
      CUTE_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (token + i >= end_) break;
        quantise(rows[i]);
        rows[i].template store_to<Tile>(tile, token + i - first_);
        if (!appends_) continue;
        typename CacheOf<T>::NewRow place;
        place.find(params_, work_, token + i);
        if (place.exists(params_)) rows[i].store(place_of(place));
      }
    }
    if constexpr (T::kTma) cute::tma_store_fence();  // the copy engine may write there again
    __syncwarp();
  }

  Params const& params_;
  Work<T> const& work_;
  int first_;  // new token in the tile's first row
  int end_;    // one past the last in the tile; 0: there are none
  bool appends_ = false;
  KeyRow<T> keys_[kBatch];
  ValueRow<T> values_[kBatch];
};

// A single one goes another way.
template <class T>
class NewTokensOfTile<T, true> {
 public:
  template <class Ring>
  CUTE_DEVICE NewTokensOfTile(Params const&, Work<T> const&, int, Ring&) {}
  CUTE_DEVICE void put_keys(typename T::Stored*) const {}
  CUTE_DEVICE void put_values(typename T::Stored*) const {}
};

}  // namespace gqa
