// Numbers in bfloat16 as float16, for an MMA that multiplies that: packed pairs of them.
#pragma once

#include <gqa/arch/ptx.cuh>

namespace gqa {

// A power of two by which numbers are divided: the largest of them is near the end of float16's
// range then. Both types hold 1 sign, the exponent and the fraction in this order, so the division
// and the change of type are one subtraction from the exponent, and a shift.
//
// What is divided is exact, but for numbers below 2^-29 of the largest, which are off by less than
// 2^-30 of it. Infinities and NaN stay what they are.
class Narrowing {
 public:
  // The largest magnitude, of one bfloat16.
  CUTE_DEVICE explicit Narrowing(uint32_t largest)
      : lost_(min(max(largest >> kFraction, kLargestExponent), kLargestOfWide) - kLargestExponent),
        least_(lost_ << kFraction | lost_ << (16 + kFraction)) {}

  CUTE_DEVICE uint32_t operator()(uint32_t pair) const {
    uint32_t const magnitudes = max_of_bfloat16(pair & 0x7fff7fff, least_);
    return (pair & 0x80008000) | (magnitudes * kFactor - least_ * kFactor);
  }

  // What they were divided by.
  CUTE_DEVICE float divisor() const { return __uint_as_float((lost_ + kBiasKept) << 23); }

 private:
  static constexpr int kFraction = 7;               // bits of bfloat16's
  static constexpr uint32_t kFactor = 1 << 3;       // float16 has three more
  static constexpr uint32_t kLargestExponent = 30;  // of float16, in its bits
  static constexpr uint32_t kLargestOfWide = 254;   // of bfloat16
  static constexpr uint32_t kBiasKept = 15;         // 127 of 1.0f, less what both biases differ by

  uint32_t lost_;   // from exponents
  uint32_t least_;  // what becomes zero, twice
};

}  // namespace gqa
