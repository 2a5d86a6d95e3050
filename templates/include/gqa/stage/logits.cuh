// Between stages 2 and 3: what the product of a query and a key counts for in the softmax.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

// Where the sequence ends, counted from a tile's first token.
struct TileEnd {
  int end, query;

  CUTE_DEVICE Position at(int token) const { return {token, end, query}; }
};

template <class T>
struct Logits {
  LogitOf<T> logit;
  BiasOf<T> bias;
  MaskOf<T> mask;

  CUTE_DEVICE Logits(Params const& p, Work<T> const& w) : Logits(p, BiasOf<T>(p, w)) {}
  CUTE_DEVICE Logits(Params const& p, BiasOf<T> const& b) : logit(p), bias(b), mask(p) {}

  // Of one key; `head` counts the lane's.
  CUTE_DEVICE float operator()(float dot, int head, Position at) const {
    float const s = bias(logit(dot, head, at), head, at);
    return mask.sees(at) ? s : -kInfinity;
  }
};

}  // namespace gqa
