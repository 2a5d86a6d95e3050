// Row: a sequence has the row that an index says, any of a cache that may have more (continuous
// batching).
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct IndexedRow {
  CUTE_DEVICE static int row(Params const& p, int batch) {
    int const row = p.cache_batch_idx[batch];
    return row < p.cache_rows ? row : -1;
  }
  CUTE_DEVICE static constexpr bool is_own() { return false; }
};

}  // namespace gqa
