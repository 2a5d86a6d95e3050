// Elements of tensors that may be of several types.
#pragma once

#include <cute/config.hpp>
#include <cutlass/numeric_types.h>

#include <gqa/params.cuh>

namespace gqa {

// Without branches, so that many are asked for before one is waited for.
struct Number {
  uint32_t bits;

  CUTE_DEVICE void load(void const* numbers, NumberType type, int64_t i) {
    bool const is_wide = type == NumberType::kFloat32;
    bits = 0;
    if (is_wide) bits = static_cast<uint32_t const*>(numbers)[i];
    if (!is_wide) bits = static_cast<uint16_t const*>(numbers)[i];
  }
  CUTE_DEVICE float value(NumberType type) const {
    float const half = float(cutlass::half_t::bitcast(uint16_t(bits)));
    uint32_t const wide = type == NumberType::kBfloat16 ? bits << 16 : bits;
    return type == NumberType::kFloat16 ? half : __uint_as_float(wide);
  }
};

CUTE_DEVICE float number_at(void const* numbers, NumberType type, int64_t i) {
  Number number;
  number.load(numbers, type, i);
  return number.value(type);
}

struct NumberPair {
  Number x, y;

  CUTE_DEVICE void load(void const* numbers, NumberType type, int64_t first, int64_t second) {
    x.load(numbers, type, first);
    y.load(numbers, type, second);
  }
  CUTE_DEVICE float2 value(NumberType type) const { return {x.value(type), y.value(type)}; }
};

}  // namespace gqa
