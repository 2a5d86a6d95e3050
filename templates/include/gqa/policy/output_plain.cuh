// Output: divided by the sum over the keys alone.
#pragma once

#include <gqa/policy/slots.cuh>
#include <gqa/stage/combine.cuh>

namespace gqa {

template <class T>
struct KeysAlone {
  template <int kWidth>
  CUTE_DEVICE static void finish(Params const&, Work<T> const&, Slice, Merged<kWidth>&) {}
};

}  // namespace gqa
