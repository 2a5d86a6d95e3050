// Between stages 2 and 3: what the product of a query and a key counts for in the softmax.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

// Where the sequence ends, counted from a tile's first token.
struct TileEnd {
  int end, query;

  CUTE_DEVICE Position at(int token) const { return {token, end, query}; }
};

// What the rows of a lane see, where all see the same.
template <class T>
struct SameSight {
  CUTE_DEVICE SameSight(Params const&, Work<T> const&) {}
  CUTE_DEVICE Position at(Position newest, int) const { return newest; }
  CUTE_DEVICE static constexpr bool sees(Position, int) { return true; }
};

template <class T, bool one = kOneQuery<T>>
struct SightOfQueries {
  using Type = SameSight<T>;
};
template <class T>
struct SightOfQueries<T, false> {
  using Type = typename QueriesOf<T>::Sight;
};
template <class T>
using SightOf = typename SightOfQueries<T>::Type;

template <class T>
struct Logits {
  LogitOf<T> logit;
  BiasOf<T> bias;
  MaskOf<T> mask;
  SightOf<T> sight;

  CUTE_DEVICE Logits(Params const& p, Work<T> const& w)
      : Logits(p, BiasOf<T>(p, w), SightOf<T>(p, w)) {}
  CUTE_DEVICE Logits(Params const& p, BiasOf<T> const& b, SightOf<T> const& s)
      : logit(p), bias(b), mask(p), sight(s) {}

  // Of one key; `head` counts the lane's.
  CUTE_DEVICE float operator()(float dot, int head, Position newest) const {
    Position const at = sight.at(newest, head);
    float const s = bias(logit(dot, head, at), head, at);
    return mask.sees(at) && sight.sees(at, head) ? s : -kInfinity;
  }
};

}  // namespace gqa
