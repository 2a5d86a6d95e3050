// Elements of tensors that may be of several types.
#pragma once

#include <cute/config.hpp>
#include <cutlass/numeric_types.h>

#include <gqa/params.cuh>

namespace gqa {

CUTE_DEVICE float number_at(void const* numbers, NumberType type, int64_t i) {
  switch (type) {
    case NumberType::kFloat16:
      return float(static_cast<cutlass::half_t const*>(numbers)[i]);
    case NumberType::kBfloat16:
      return float(static_cast<cutlass::bfloat16_t const*>(numbers)[i]);
    default:
      return static_cast<float const*>(numbers)[i];
  }
}

// Two that follow one another, from an even index on. They are aligned to two elements.
CUTE_DEVICE float2 pair_of_numbers(void const* numbers, NumberType type, int64_t i) {
  if (type == NumberType::kFloat32) {
    return *reinterpret_cast<float2 const*>(static_cast<float const*>(numbers) + i);
  }
  uint32_t const both =
      *reinterpret_cast<uint32_t const*>(static_cast<uint16_t const*>(numbers) + i);
  if (type == NumberType::kFloat16) {
    auto const& pair = reinterpret_cast<cutlass::half_t const(&)[2]>(both);
    return {float(pair[0]), float(pair[1])};
  }
  auto const& pair = reinterpret_cast<cutlass::bfloat16_t const(&)[2]>(both);
  return {float(pair[0]), float(pair[1])};
}

}  // namespace gqa
