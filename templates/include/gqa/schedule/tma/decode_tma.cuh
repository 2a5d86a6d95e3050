// One decode step on Hopper: the copy engine loads, the blocks of a cluster share a sequence's KV
// head and merge through each other's shared memory.
//
//   load (per warp) -> score -> softmax -> value -> merge warps -> exchange in the cluster
//        append, the new token's score
//
// The new token is no part of the tiles: its score is one more MMA, its V joins in the merge. The
// order of what a block does before its first tile arrives is that of a race: what takes longest is
// asked for first, and nothing waits for what it does not need.
#pragma once

#include <gqa/schedule/pdl.cuh>
#include <gqa/schedule/tma/single_tile.cuh>
#include <gqa/schedule/tma/tile_scales.cuh>
#include <gqa/stage/append.cuh>
#include <gqa/stage/softmax.cuh>
#include <gqa/stage/value.cuh>

namespace gqa {

// Several tiles per warp: warps walk them alone and meet at the end.
template <class T>
CUTE_DEVICE void attend_multi_tile(TmaParams const& p, ClusterWork<T> const& w,
                                   ClusterStorage<T>& shared, TmaRing<T>& ring,
                                   Scorer<T> const& score, TileScales<T>& scales,
                                   ClusterCombine<T> const& cluster_combine) {
  int const warp = threadIdx.x / kWarpSize;
  BiasOf<T> const bias(p.decode, w);
  SightOf<T> const sight(p.decode, w);
  OnlineSoftmax<T> softmax;
  Accumulator<T> acc;
  CUTE_NO_UNROLL
  for (int tile = w.first_tile(warp); tile < w.num_tiles; tile += w.tile_step()) {
    int const left = w.tokens_in_tiles() - tile * T::kBlockN;
    float scores[T::kLaneHeads][T::kLaneTokens];
    NewTokensOfTile<T> new_tokens(p.decode, w, tile, ring);
    auto* keys = ring.wait_keys();
    new_tokens.put_keys(keys);
    scales.take(tile, new_tokens, keys, ring);
    TileEnd const end = {left, left - 1 + w.behind_tiles()};
    scales.score(score, keys, end, Logits<T>(p.decode, bias, sight), scores);
    hide_padding<T>(w, tile, scores);
    ring.refill_keys(w, tile);
    softmax.update(scores, [&](auto const& factor) { acc.rescale(factor); });
    auto* values = ring.wait_values();
    if (left < T::kBlockN) {
      clear_rows<T>(values, left);
      __syncwarp();
    }
    if constexpr (!TileScales<T>::kWithRows) new_tokens.put_values(values);
    clear_hidden_rows<T>(w, tile, values);
    scales.scale(scores, softmax.row_sum, acc);
    scales.load(tile + w.tile_step());
    acc.add(values, scores);
    ring.refill_values(w, tile);
  }
  scales.finish(acc);
  if (kMayLoseTokens<T> && ring.lost()) {
    softmax.spoil();
    report(p.decode, w);
  }
  float max[T::kLaneHeads];
  float sum[T::kLaneHeads];
  publish<T>(softmax.row_max, shared.row_max);
  __syncthreads();
  reduce_warps<T>(shared.row_max, max, Max());
  CUTE_UNROLL
  for (int h = 0; h < T::kLaneHeads; ++h) {
    float const factor = exp2_approx(softmax.row_max[h] - max[h]);
    sum[h] = softmax.row_sum[h] * factor;
    softmax.row_max[h] = factor;
  }
  acc.rescale(softmax.row_max);
  acc.store_by_dim(shared.o_partial(warp));
  reduce_lanes<T>(sum, Sum());
  publish<T>(sum, shared.row_sum);
  __syncthreads();

  if (warp == T::kNumWarps - 1) {
    reduce_warps<T>(shared.row_sum, sum, Sum());
    cluster_combine.send_max_sum(max, sum);
  }
  constexpr int kPairs = T::kBlockH / 2;
  CUTE_NO_UNROLL
  for (int i = threadIdx.x; i < T::kHeadDimV * kPairs; i += T::kNumThreads) {
    float2 o = {0.f, 0.f};
    CUTE_UNROLL
    for (int j = 0; j < T::kNumWarps; ++j) {
      float2 const part = reinterpret_cast<float2 const*>(shared.o_partial(j))[i];
      o.x += part.x;
      o.y += part.y;
    }
    cluster_combine.target(i / kPairs, i % kPairs).send(o, cluster_combine.alone());
  }
}

template <class Variant>
CUTE_DEVICE void decode_tma(TmaParams const& p) {
  using T = Traits<Variant>;
  extern __shared__ __align__(1024) unsigned char storage[];
  auto& shared = *reinterpret_cast<ClusterStorage<T>*>(storage);
  int const warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);  // known to be uniform
  int const first_tile = blockIdx.y * T::kNumWarps + warp;
  int length;
  if constexpr (!T::kPdl) length = Work<T>::read_length(p.decode);  // as early as it may
  TmaRing<T> ring(p, shared, warp, first_tile);
  if constexpr (T::kPdl) {
    follow_previous_kernel(p.decode.pdl, [&] { ring.prefetch(first_tile); });
    length = Work<T>::read_length(p.decode);
  }
  ring.start(first_tile);
  // All lanes wait for the length here, before the queries are asked for: a warp waits for one kind
  // of load at a time, and the queries come behind the tiles.
  length = __shfl_sync(0xffffffffu, length, 0);
  ClusterWork<T> const w(p.decode, length);
  // Tiles that were not known before, which everybody waits for, are asked for before the queries.
  constexpr bool kLate = !kKnowsTiles<T>;
  if (kLate && !w.is_idle()) ring.fill(w, w.first_tile(warp));
  TileScales<T> scales(p.decode, w);
  scales.load(w.first_tile(warp));
  // Rows that are prepared are waited for, those of the new token by another warp than those of
  // most queries.
  NewToken<T> token;
  bool const brings_token = kOneQuery<T> && w.appends && warp == T::kNumWarps - 1;
  if (kPreparesRows<T> && brings_token) token.load(p.decode, w);
  Scorer<T> score(p.decode, w, shared);
  if (kTokenAhead<T> && !kPreparesRows<T> && brings_token) token.load(p.decode, w);
  if (w.is_idle()) {
    // The others wait for whoever has not arrived: for this block's tiles, then, and for its end.
    if (w.log_num_ranks > 0) cute::cluster_arrive_relaxed();
    return ring.drain();
  }
  if (!kLate) ring.fill(w, w.first_tile(warp));
  ClusterCombine<T> const cluster_combine(shared, w);
  if (threadIdx.x == T::kNumThreads - kWarpSize) {
    barrier_init(shared.combine_barrier);
    barrier_init_fence();
    cluster_combine.expect();
  }
  if (w.log_num_ranks > 0) cute::cluster_arrive_relaxed();
  score.take_queries();  // which may wait for them: behind the arrival, which others wait for
  score.take_scale(p.decode, w);
  if (brings_token) {
    if (!kTokenAhead<T>) token.load(p.decode, w);
    token.quantise();
    token.key.store(shared.new_key);
    token.value.store(shared.new_value);
    scales.store(token, shared);
    if (kMayLoseTokens<T> && w.split == 0 && token.row.lost(p.decode)) ring.lose();
    if (w.split == 0 && w.head_block == 0) {
      token.append(p.decode, w);
      scales.append(token);
    }
  }
  // Every block's barrier is ready. A block that is alone sends nothing, and waits for nobody.
  if (w.log_num_ranks > 0) cute::cluster_wait();
  if (w.num_walked_tiles() <= w.tile_step()) {
    attend_single_tile(p, w, shared, ring, score, scales, cluster_combine);
  } else {
    attend_multi_tile(p, w, shared, ring, score, scales, cluster_combine);
  }
  if (T::kPdl && p.decode.pdl == Pdl::kEnd) start_next_kernel();
  cluster_combine.receive(p.decode, score);
  report_overflow(p.decode, w);
}

}  // namespace gqa
