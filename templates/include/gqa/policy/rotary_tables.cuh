// Rotary: the first dims of queries and new keys are turned, two and two, by angles that grow with
// the position, whose cosines and sines are in tables (RoFormer, arXiv:2104.09864). Two dims are
// neighbours (GPT-J), or as far apart as half of those that are turned (GPT-NeoX, Llama).
#pragma once

#include <gqa/arch/number.cuh>
#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct RotatedByTables {
  CUTE_DEVICE static constexpr bool none() { return false; }

  // The position of a sequence's first new token.
  CUTE_DEVICE static int first_position(Params const& p, int batch, int length) {
    return p.rotary_seqlens != nullptr ? p.rotary_seqlens[batch] : length;
  }
  CUTE_DEVICE static bool fits(Params const& p, int batch, int length, int count) {
    int const first = first_position(p, batch, length);
    return first >= 0 && first <= p.rotary_positions - count;
  }

  template <class PairAt>
  CUTE_DEVICE static float2 turned(Params const& p, int position, int dim, PairAt&& pair_at) {
    float2 const x = pair_at(dim);
    if (dim >= p.rotary_dim) return x;
    int64_t const cos_row = position * p.rotary_cos_stride;
    int64_t const sin_row = position * p.rotary_sin_stride;
    if (p.rotary_interleaved) {
      float const cos = number_at(p.rotary_cos, p.rotary_type, cos_row + dim / 2);
      float const sin = number_at(p.rotary_sin, p.rotary_type, sin_row + dim / 2);
      return {x.x * cos - x.y * sin, x.y * cos + x.x * sin};
    }
    int const half = p.rotary_dim / 2;
    bool const is_lower = dim < half;
    float2 const other = pair_at(is_lower ? dim + half : dim - half);
    int const angle = is_lower ? dim : dim - half;
    float2 const cos = pair_of_numbers(p.rotary_cos, p.rotary_type, cos_row + angle);
    float2 const sin = pair_of_numbers(p.rotary_sin, p.rotary_type, sin_row + angle);
    float const sign = is_lower ? -1.f : 1.f;
    return {fmaf(sign * other.x, sin.x, x.x * cos.x), fmaf(sign * other.y, sin.y, x.y * cos.y)};
  }
};

}  // namespace gqa
