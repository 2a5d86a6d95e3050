// Start: rows of padding come before the first token of a sequence, as in batches of prompts that
// end together.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct LeftPadded {
  CUTE_DEVICE static int padding(Params const& p, int batch) {
    int const rows = p.cache_leftpad[batch];
    return rows > 0 ? rows : 0;
  }
  CUTE_DEVICE static constexpr bool none() { return false; }
};

}  // namespace gqa
