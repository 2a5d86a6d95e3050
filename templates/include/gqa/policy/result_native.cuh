// Result: rounded to the type of the queries.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct AsQueries {
  template <int kWidth>
  CUTE_DEVICE static auto rounded(cutlass::Array<float, kWidth> const& values) {
    return cutlass::NumericArrayConverter<typename T::Element, float, kWidth>{}(values);
  }
};

}  // namespace gqa
