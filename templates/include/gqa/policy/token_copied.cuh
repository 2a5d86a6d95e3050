// New token: k and v as they are given.
#pragma once

#include <gqa/policy/slots.cuh>
#include <gqa/stage/row.cuh>

namespace gqa {

template <class T>
struct CopiedToken {
  using Element = typename T::Element;

  CUTE_DEVICE static void load(Params const& p, Work<T> const& w, KeyRow<T>& key,
                               ValueRow<T>& value) {
    key.load(w.template row<Element>(p.k_new, p.k_new_stride));
    value.load(w.template row<Element>(p.v_new, p.v_new_stride));
  }
};

}  // namespace gqa
