// Operands: caches of float8_e5m2, which the MMA multiplies as float16.
#pragma once

#include <gqa/policy/element_fp8.cuh>

namespace gqa {

template <class T>
struct E5m2Operands : Fp8Operands<T, E5m2> {
  using Stored = uint16_t;
  using Multiplied = cutlass::half_t;
};

}  // namespace gqa
