// One decode step of grouped-query attention in one launch: append the new token's K and V, attend
// over everything cached and the new token, write the output.
//
//   load (per warp) -> score -> softmax -> value -> merge warps -> merge splits
//   append (last tile)
//
// A warp walks its tiles alone; warps meet once, at the end.
#pragma once

#include <gqa/params.cuh>
#include <gqa/schedule/multistage/load.cuh>
#include <gqa/schedule/multistage/merge.cuh>
#include <gqa/schedule/multistage/storage.cuh>
#include <gqa/schedule/pdl.cuh>
#include <gqa/stage/append.cuh>
#include <gqa/stage/score.cuh>
#include <gqa/stage/softmax.cuh>
#include <gqa/stage/tile_scheduler.cuh>
#include <gqa/stage/value.cuh>
#include <gqa/traits.cuh>

namespace gqa {

// Puts the new token's row into the last tile, which has arrived. All lanes take part.
template <class Tile, class Row, class Element>
CUTE_DEVICE void put_new_row(Row const& row, int left, Element* tile) {
  row.store(tile + typename Tile::Layout{}(left - 1, 0));
  __syncwarp();
}

template <class T>
CUTE_DEVICE void attend(Params const& p, Work<T> const& w, SharedStorage<T>& shared,
                        TileRing<T>& ring) {
  int const warp = threadIdx.x / kWarpSize;
  ring.fill(p, w, w.first_tile(warp));
  TokenAhead<T> ahead;
  if (kPreparesRows<T>) ahead.load(p, w, warp);
  Scorer<T> score(p, w, shared);
  if (!kPreparesRows<T>) ahead.load(p, w, warp);
  score.take_queries();
  score.take_scale(p, w);
  Logits<T> const logits(p, w);
  OnlineSoftmax<T> softmax;
  Accumulator<T> acc(shared);
  CUTE_NO_UNROLL
  for (int tile = w.first_tile(warp); tile < w.num_tiles; tile += w.tile_step()) {
    int const left = w.num_tokens - tile * T::kBlockN;
    bool const last = tile == w.num_tiles - 1;
    float scores[T::kLaneHeads][T::kLaneTokens];
    NewToken<T> token;
    if constexpr (kTokenAhead<T>) token = ahead.token();
    if (kOneQuery<T> && last && w.appends) {
      if (!kTokenAhead<T>) token.load(p, w);
      token.quantise();
    }
    NewTokensOfTile<T> new_tokens(p, w, tile, ring);
    auto* keys = ring.wait_keys();
    new_tokens.put_keys(keys);
    if (kOneQuery<T> && last && w.appends) {
      put_new_row<typename T::KeyTile>(token.key, left, keys);
      if (kMayLoseTokens<T> && token.row.lost(p)) ring.lose();
      if (w.head_block == 0) token.append(p, w);
    }
    score(keys, {left, left - 1}, logits, scores);
    hide_padding<T>(w, tile, scores);
    ring.refill_keys(w, tile);
    softmax.update(scores, [&](auto const& factor) { acc.rescale(factor); });
    auto* values = ring.wait_values();
    if (last) {  // behind the sequence's end may be what the cache holds there
      clear_value_rows<T>(values, left);
      if (kOneQuery<T> && w.appends) put_new_row<typename T::ValueTile>(token.value, left, values);
      __syncwarp();
    }
    new_tokens.put_values(values);
    acc.add(values, scores);
    ring.refill_values(w, tile);
  }
  ring.drain();
  if (kMayLoseTokens<T> && ring.lost()) {
    softmax.spoil();
    report(p, w);
  }
  acc.store(reinterpret_cast<float*>(shared.warp[warp]));
  softmax.store(shared.row_max[warp], shared.row_sum[warp]);
}

template <class Variant>
CUTE_DEVICE void decode(Params const& p) {
  using T = Traits<Variant>;
  extern __shared__ __align__(16) unsigned char storage[];
  auto& shared = *reinterpret_cast<SharedStorage<T>*>(storage);
  int const warp = threadIdx.x / kWarpSize;
  int const first_tile = blockIdx.y * T::kNumWarps + warp;
  TileRing<T> ring(p, shared.warp[warp], first_tile);
  if constexpr (T::kPdl) {
    follow_previous_kernel(p.pdl, [&] { ring.prefetch(p, first_tile); });
  }
  int const length = Work<T>::read_length(p);
  ring.start(p, first_tile);
  Work<T> const w(p, length);
  if (w.is_idle()) return ring.drain();
  attend(p, w, shared, ring);
  if (T::kPdl && p.pdl == Pdl::kEnd) start_next_kernel();
  __syncthreads();
  merge(p, w, shared);
  report_overflow(p, w);
}

}  // namespace gqa
