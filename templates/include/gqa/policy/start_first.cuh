// Start: sequences begin in the first row of their cache.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct FirstRow {
  CUTE_DEVICE static int padding(Params const&, int) { return 0; }
  CUTE_DEVICE static constexpr bool none() { return true; }
};

}  // namespace gqa
