// Scales that the tokens of a tile have each by itself. Most caches have none, and what stands here
// leaves no code; a policy whose tokens have some specialises it.
#pragma once

#include <gqa/schedule/tma/storage_tma.cuh>
#include <gqa/stage/append.cuh>
#include <gqa/stage/score.cuh>
#include <gqa/stage/value.cuh>

namespace gqa {

template <class T, class Operands = OperandsOf<T>>
struct TileScales {
  CUTE_DEVICE TileScales(Params const&, Work<T> const&) {}

  // Asks for those of a tile, which the calls below are about.
  CUTE_DEVICE void load(int) {}

  CUTE_DEVICE void score(Scorer<T> const& scorer, typename T::Stored const* keys, TileEnd end,
                         Logits<T> const& logit,
                         float (&scores)[T::kLaneHeads][T::kLaneTokens]) const {
    scorer(keys, end, logit, scores);
  }

  // Whether new tokens bring theirs into tiles: then values are put there before keys are scored.
  static constexpr bool kWithRows = false;
  template <class Ring>
  CUTE_DEVICE void take(int, NewTokensOfTile<T>&, typename T::Stored*, Ring&) const {}

  // Where a warp has several tiles: makes probabilities what the MMA takes, and this lane's sums of
  // them what they count, as in the end sums of their products.
  CUTE_DEVICE void scale(float (&)[T::kLaneHeads][T::kLaneTokens], float (&)[T::kLaneHeads],
                         Accumulator<T>&) {}
  CUTE_DEVICE void finish(Accumulator<T>&) const {}

  // Where all warps multiply the tiles of a block: what they tell each other before a barrier, and
  // the same behind it.
  CUTE_DEVICE void publish(ClusterStorage<T>&) const {}
  CUTE_DEVICE void scale(float (&)[T::kLaneHeads][T::kLaneTokens], float (&)[T::kLaneHeads],
                         ClusterStorage<T>&) {}
  CUTE_DEVICE float2 finish(float2 sums) const { return sums; }

  // The new token: what of it lies behind its rows in shared memory and in the cache, and what its
  // key's products count.
  CUTE_DEVICE static void store(NewToken<T> const&, ClusterStorage<T>&) {}
  CUTE_DEVICE void append(NewToken<T> const&) const {}
  CUTE_DEVICE static Scorer<T> const& of_new_key(Scorer<T> const& scorer, ClusterStorage<T>&) {
    return scorer;
  }
};

}  // namespace gqa
