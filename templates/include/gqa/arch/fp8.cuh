// The two types of 8 bits: made float16, which has all of their numbers, and rounded to.
#pragma once

#include <cute/config.hpp>
#include <cutlass/numeric_types.h>

#include <gqa/arch/ptx.cuh>

namespace gqa {

// Rounds to the nearest number of `Format`, ties to even, and numbers beyond its last to that one;
// NaN stays NaN: what cvt does where there is one. The value of a subnormal is a multiple of the
// least one, to which adding a power of two rounds it; that of others loses bits of the fraction.
template <class Format>
CUTE_DEVICE uint32_t rounded_to(float x) {
  constexpr uint32_t kExponentOne = 127;  // of 1.0f, in its bits
  constexpr int kDropped = 23 - Format::kFraction;
  constexpr uint32_t kSmallest = (kExponentOne + Format::kMinExponent) << 23;
  constexpr uint32_t kRounder = kSmallest + (uint32_t(kDropped) << 23);
  uint32_t const sign = __float_as_uint(x) >> 24 & 0x80u;
  if (x != x) return sign | 0x7fu;
  float const magnitude = fminf(fabsf(x), Format::kMax);
  uint32_t const bits = __float_as_uint(magnitude);
  if (bits < kSmallest) {
    return sign | (__float_as_uint(magnitude + __uint_as_float(kRounder)) - kRounder);
  }
  uint32_t const half = (1u << (kDropped - 1)) - 1 + (bits >> kDropped & 1);
  return sign | (((bits + half) >> kDropped) -
                 ((kExponentOne + Format::kMinExponent - 1) << Format::kFraction));
}

// float8_e4m3fn: 1 sign, 4 bits of exponent, 3 of fraction; NaN where all are ones, no infinity.
struct E4m3 {
  static constexpr int kFraction = 3;
  static constexpr int kMinExponent = -6;  // of normal numbers
  static constexpr float kMax = 448.f;

  // Four of them, in the order of their bytes, as float16. PTX ISA 9.7.9.22, cvt; architectures
  // without it move exponent and fraction to where float16 has them, and multiply by what the two
  // biases differ by. What came of NaN is 480 then, the one that lacks a bit of an exponent of
  // ones.
  CUTE_DEVICE static void halves(uint32_t four, uint32_t& low, uint32_t& high) {
#if __CUDA_ARCH__ >= 890
    asm("{\n"
        ".reg .b16 l, h;\n"
        "mov.b32 {l, h}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, l;\n"
        "cvt.rn.f16x2.e4m3x2 %1, h;\n"
        "}"
        : "=r"(low), "=r"(high)
        : "r"(four));
#else
    low = scaled(__byte_perm(four, 0, 0x1404));
    high = scaled(__byte_perm(four, 0, 0x3424));
#endif
  }

  // Two floats, rounded.
  CUTE_DEVICE static uint16_t rounded(float low, float high) {
#if __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return rounded_to<E4m3>(low) | rounded_to<E4m3>(high) << 8;
#endif
  }

 private:
  // Two, in the upper halves of 16 bits each.
  CUTE_DEVICE static uint32_t scaled(uint32_t two) {
    constexpr uint32_t kFactor = 0x5c005c00;  // 2^8, twice
    uint32_t const magnitude = (two & 0x7f007f00) >> 1;
    uint32_t number;
    asm("mul.rn.f16x2 %0, %1, %2;"
        : "=r"(number)
        : "r"(magnitude | (two & 0x80008000)), "r"(kFactor));
    return number | ((magnitude + 0x00800080) >> 1 & 0x20002000);
  }
};

// float8_e5m2: the upper half of float16.
struct E5m2 {
  static constexpr int kFraction = 2;
  static constexpr int kMinExponent = -14;
  static constexpr float kMax = 57344.f;

  CUTE_DEVICE static void halves(uint32_t four, uint32_t& low, uint32_t& high) {
    low = __byte_perm(four, 0, 0x1404);
    high = __byte_perm(four, 0, 0x3424);
  }

  CUTE_DEVICE static uint16_t rounded(float low, float high) {
#if __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return rounded_to<E5m2>(low) | rounded_to<E5m2>(high) << 8;
#endif
  }
};

// A divisor of 16-bit numbers whose quotients are rounded to one of the types: they become what the
// nearest float32 becomes. Division itself is a subroutine, which a row would call for every
// number.
//
// A product with an approximate reciprocal is corrected by what it leaves of the dividend
// (Markstein, Computation of elementary functions on the IBM RISC System/6000 processor). What is
// rounded then is off by less than 2^-20 of a unit in the last place, so it becomes another float32
// only if the quotient is as close to halfway between two; beside a number where rounding to
// either type changes, no quotient of 11 bits by 24 is. Remainders are exact enough where a power
// of two keeps the divisor away from the ends of the range.
class Divisor {
 public:
  CUTE_DEVICE explicit Divisor(float divisor) {
    float const magnitude = fabsf(divisor);
    factor_ = magnitude < kSmall ? 1 / kSmall : magnitude > kLarge ? 1 / kLarge : 1.f;
    divisor_ = magnitude * factor_;
    factor_ = copysignf(factor_, divisor);
    reciprocal_ = reciprocal_approx(divisor_);
  }

  // x over it. The remainder's sign keeps that of a zero; there is none of infinities and NaN.
  CUTE_DEVICE float under(float x) const {
    float const number = x * factor_;
    float const first = number * reciprocal_;
    float const negated_rest = fmaf(first, divisor_, -number);
    return fabsf(negated_rest) <= fabsf(number) ? fmaf(-negated_rest, reciprocal_, first) : first;
  }

 private:
  static constexpr float kSmall = 5.4210109e-20f, kLarge = 1.8446744e19f;  // 2^-64 and 2^64

  float factor_, divisor_, reciprocal_;
};

// The same of two, as floats.
template <class Format>
CUTE_DEVICE float2 floats(uint16_t two) {
  uint32_t low, high;
  Format::halves(two, low, high);
  auto const* pair = reinterpret_cast<cutlass::half_t const*>(&low);
  return make_float2(float(pair[0]), float(pair[1]));
}

}  // namespace gqa
