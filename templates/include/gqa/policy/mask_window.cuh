// Mask: the query's own token and so many before it, a sliding window (Mistral, Gemma, gpt-oss).
// What lies to the right of the newest token is not there, so that no window ends there.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct SlidingWindow {
  int left;

  CUTE_DEVICE explicit SlidingWindow(Params const& p) : left(p.window_left) {}
  CUTE_DEVICE bool sees(Position at) const {
    return at.token < at.end && at.token >= at.query - left;
  }
  CUTE_DEVICE static int first_token(Params const& p, int, int num_tokens) {
    int const first = num_tokens - 1 - p.window_left;
    return first > 0 ? first : 0;
  }
  CUTE_DEVICE static constexpr bool from_start() { return false; }
};

}  // namespace gqa
