// The tensor core instruction, m16n8k16 with fp32 sums. Fragments: PTX ISA 9.7.14.5.8.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cutlass/numeric_conversion.h>

#include <gqa/traits.cuh>

namespace gqa {

template <class Element>
struct MmaOf;
template <>
struct MmaOf<cutlass::half_t> {
  using Atom = cute::SM80_16x8x16_F32F16F16F32_TN;
};
template <>
struct MmaOf<cutlass::bfloat16_t> {
  using Atom = cute::SM80_16x8x16_F32BF16BF16F32_TN;
};

// c += a * b
template <class Element>
CUTE_DEVICE void mma(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  MmaOf<Element>::Atom::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1],
                            c[2], c[3]);
}

// P^T, the B operand of 16 tokens: what lanes hold by rows (tokens), rounded and turned to columns.
// `token` counts the lane's tokens; the operand takes two of them.
template <class T>
CUTE_DEVICE void probability_operand(float const (&probability)[T::kLaneHeads][T::kLaneTokens],
                                     int token, uint32_t (&p)[T::kBlockH / 8][2]) {
  CUTE_UNROLL
  for (int n = 0; n < T::kBlockH / 8; ++n) {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      cutlass::Array<float, 2> pair;
      pair[0] = probability[2 * n][token + half];
      pair[1] = probability[2 * n + 1][token + half];
      auto const packed = cutlass::NumericArrayConverter<typename T::Multiplied, float, 2>{}(pair);
      cute::SM75_U32x1_MOVM_T::copy(reinterpret_cast<uint32_t const&>(packed), p[n][half]);
    }
  }
}

}  // namespace gqa
