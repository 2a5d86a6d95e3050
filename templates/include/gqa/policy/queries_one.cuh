// Queries: one per sequence, that of its newest token, which sees all that there is.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct OneQuery {
  CUTE_DEVICE static constexpr bool is_one() { return true; }
};

}  // namespace gqa
