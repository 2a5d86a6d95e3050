// Row: a sequence has the row of its number.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct OwnRow {
  CUTE_DEVICE static int row(Params const&, int batch) { return batch; }
  CUTE_DEVICE static constexpr bool is_own() { return true; }
};

}  // namespace gqa
