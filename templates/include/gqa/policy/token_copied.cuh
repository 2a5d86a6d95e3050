// New token: k as it is given, or normed and rotated; v as it is given.
#pragma once

#include <gqa/policy/slots.cuh>
#include <gqa/stage/prepare.cuh>

namespace gqa {

template <class T>
struct CopiedToken {
  using Element = typename T::Element;

  CUTE_DEVICE static void load_key(Params const& p, Work<T> const& w, int token, KeyRow<T>& key) {
    auto const* row = w.template row<Element>(p.k_new, p.k_new_stride, p.k_new_token_stride, token);
    if constexpr (!kPreparesRows<T>) {
      key.load(row);
    } else if constexpr (RotaryOf<T>::none()) {
      key.prepare(p, Side::kKey, row, 0);
    } else {
      key.prepare(p, Side::kKey, row, position_of(p, w, token));
    }
  }
  CUTE_DEVICE static void load_value(Params const& p, Work<T> const& w, int token,
                                     ValueRow<T>& value) {
    value.load(w.template row<Element>(p.v_new, p.v_new_stride, p.v_new_token_stride, token));
  }
};

}  // namespace gqa
