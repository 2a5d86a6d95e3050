// Stage 5, append: the new token's K and V into the cache, bit for bit or as the cache stores
// them, once per KV head.
#pragma once

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
    NewTokenOf<T>::load(p, w, key, value);
    OperandsOf<T>::quantise(p, w, key, value);
    row.find(p, w);  // behind it, for it may wait for what it reads
  }

  // Writes it to the cache, for which one warp per KV head calls. What this launch reads of these
  // rows it does not use.
  CUTE_DEVICE void append(Params const& p, Work<T> const& w) const {
    if (!row.exists(p)) return;
    key.store(row.key(p, w));
    value.store(row.value(p, w));
  }
};

}  // namespace gqa
