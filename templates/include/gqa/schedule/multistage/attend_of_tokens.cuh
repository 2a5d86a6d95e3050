// The main loop of the multistage schedule with scales of tokens: an overload for kernels that
// include this header, so that no other kernel is concerned.
#pragma once

#include <gqa/policy/element_fp8_tokens.cuh>
#include <gqa/schedule/multistage/decode.cuh>

namespace gqa {

template <class V>
CUTE_DEVICE void attend(Params const& p, Work<Traits<V>> const& w, SharedStorage<Traits<V>>& shared,
                        TileRing<Traits<V>>& ring) {
  using T = Traits<V>;
  int const warp = threadIdx.x / kWarpSize;
  ring.fill(p, w, w.first_tile(warp));
  TokenScales<T> scales(p, w);
  scales.load(w.first_tile(warp));
  TokenAhead<T> ahead;
  if (kPreparesRows<T>) ahead.load(p, w, warp);
  Scorer<T> score(p, w, shared);
  if (!kPreparesRows<T>) ahead.load(p, w, warp);
  score.take_queries();
  score.take_scale(p, w);
  Logits<T> const logits(p, w);
  OnlineSoftmax<T> softmax;
  Accumulator<T> acc(shared);
  ValueRange<T> range;
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
    if constexpr (!kOneQuery<T>) {
      if (NewTokens<T>::are_in(w, tile)) {  // whose scales come with their rows
        scales.take_keys(tile, keys);
        ring.drain();
        auto* values = ring.wait_values();
        new_tokens.put_values(values);
        scales.take_values(tile, values);
      }
    }
    if (kOneQuery<T> && last && w.appends) {
      put_new_row<typename T::KeyTile>(token.key, left, keys);
      scales.put(left - 1, token);
      if (kMayLoseTokens<T> && token.row.lost(p)) ring.lose();
      if (w.head_block == 0) {
        token.append(p, w);
        scales.append(token);
      }
    }
    score_tile<T>(score, keys, {left, left - 1}, logits, scales, scores);
    hide_padding<T>(w, tile, scores);
    ring.refill_keys(w, tile);
    softmax.update(scores, [&](auto const& factor) { acc.rescale(factor); });
    range.scale(scales, acc, scores, softmax.row_sum);
    scales.load(tile + w.tile_step());
    auto* values = ring.wait_values();
    if (last) {
      clear_value_rows<T>(values, left);
      if (kOneQuery<T> && w.appends) put_new_row<typename T::ValueTile>(token.value, left, values);
      __syncwarp();
    }
    acc.add(values, scores);
    ring.refill_values(w, tile);
  }
  range.finish(acc);
  ring.drain();
  if (kMayLoseTokens<T> && ring.lost()) {
    softmax.spoil();
    report(p, w);
  }
  acc.store(reinterpret_cast<float*>(shared.warp[warp]));
  softmax.store(shared.row_max[warp], shared.row_sum[warp]);
}

}  // namespace gqa
