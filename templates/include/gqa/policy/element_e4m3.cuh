// Operands: caches of float8_e4m3fn, which the MMA multiplies as float16.
#pragma once

#include <gqa/policy/element_fp8.cuh>

namespace gqa {

template <class T>
struct E4m3Operands : Fp8Operands<T, E4m3> {
  using Stored = uint16_t;
  using Multiplied = cutlass::half_t;
};

}  // namespace gqa
