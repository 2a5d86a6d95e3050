// Operands: elements of the type that the MMA multiplies.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct NativeOperands {
  // 16 tokens and 16 dims of K, the A operand. `row` is this lane's of 16, and its half of them.
  CUTE_DEVICE static void key_fragment(cute::uint128_t const& row, uint32_t (&k)[4]) {
    cute::SM75_U32x4_LDSM_N::copy(row, k[0], k[1], k[2], k[3]);
  }
  // The same of V^T: 16 dims and 16 tokens.
  CUTE_DEVICE static void value_fragment(cute::uint128_t const& row, uint32_t (&v)[4]) {
    cute::SM75_U16x8_LDSM_T::copy(row, v[0], v[1], v[2], v[3]);
  }
  // On CUDA cores.
  CUTE_DEVICE static float number(typename T::Element element) { return float(element); }
};

}  // namespace gqa
