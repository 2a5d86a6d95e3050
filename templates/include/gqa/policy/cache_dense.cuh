// Cache: every sequence has rows of its own, one stride apart.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct DenseCache {
  using Element = typename T::Element;

  // The rows of one KV head of one sequence, in K or in V.
  struct Rows {
    Element* first;
    int64_t stride;

    CUTE_DEVICE Rows(void* base, CacheStrides const& strides, int row)
        : first(static_cast<Element*>(base) + row * strides.batch +
                kv_head_of_block<T>() * strides.head),
          stride(strides.token) {}

    CUTE_DEVICE Element* operator()(int token) const { return first + token * stride; }
  };

  // The row that a token takes which is appended.
  CUTE_DEVICE static Element* new_row(void* base, CacheStrides const& stride, Work<T> const& w) {
    return static_cast<Element*>(base) + w.cache_row() * stride.batch +
           w.num_cached * stride.token + w.kv_head * stride.head;
  }
  CUTE_DEVICE static Element* new_key(Params const& p, Work<T> const& w) {
    return new_row(p.k_cache, p.k_cache_stride, w);
  }
  CUTE_DEVICE static Element* new_value(Params const& p, Work<T> const& w) {
    return new_row(p.v_cache, p.v_cache_stride, w);
  }

  CUTE_DEVICE static Rows keys(Params const& p, int row) {
    return Rows(p.k_cache, p.k_cache_stride, row);
  }
  CUTE_DEVICE static Rows values(Params const& p, int row) {
    return Rows(p.v_cache, p.v_cache_stride, row);
  }
  CUTE_DEVICE static Box box(int tile) {
    return {tile * T::kBlockN, kv_head_of_block<T>(), int(blockIdx.z)};
  }
};

}  // namespace gqa
