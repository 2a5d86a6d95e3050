// Mask: everything up to the end of the sequence.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct WholeSequence {
  CUTE_DEVICE explicit WholeSequence(Params const&) {}
  CUTE_DEVICE static bool sees(Position at) { return at.token < at.end; }
  CUTE_DEVICE static int first_token(Params const&, int, int) { return 0; }
  CUTE_DEVICE static constexpr bool from_start() { return true; }
};

}  // namespace gqa
