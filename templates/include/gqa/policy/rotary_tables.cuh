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

  // The first of the two dims with which a pair of neighbours turns; its own if it does not.
  CUTE_DEVICE static int other(Params const& p, int dim) {
    int const half = p.rotary_dim / 2;
    if (p.rotary_interleaved || dim >= p.rotary_dim) return dim;
    return dim < half ? dim + half : dim - half;
  }

  // Of pairs of neighbours, at a position that the tables have.
  template <int kCount>
  struct Angles {
    NumberPair cos[kCount], sin[kCount];

    CUTE_DEVICE Angles(Params const& p, int position, int const (&dims)[kCount]) {
      int64_t const cos_row = position * p.rotary_cos_stride;
      int64_t const sin_row = position * p.rotary_sin_stride;
      int const half = p.rotary_dim / 2;
      CUTE_UNROLL
      for (int i = 0; i < kCount; ++i) {
        int const dim = dims[i] < p.rotary_dim ? dims[i] : 0;
        int const first = p.rotary_interleaved ? dim / 2 : dim < half ? dim : dim - half;
        int const second = p.rotary_interleaved ? first : first + 1;
        cos[i].load(p.rotary_cos, p.rotary_type, cos_row + first, cos_row + second);
        sin[i].load(p.rotary_sin, p.rotary_type, sin_row + first, sin_row + second);
      }
    }
    CUTE_DEVICE float2 turned(Params const& p, float2 x, float2 other, int dim, int i) const {
      bool const is_lower = dim < p.rotary_dim / 2;
      float2 const with = p.rotary_interleaved ? float2{-x.y, x.x}
                          : is_lower           ? float2{-other.x, -other.y}
                                               : other;
      float2 const c = cos[i].value(p.rotary_type);
      float2 const s = sin[i].value(p.rotary_type);
      float2 const turned = {fmaf(with.x, s.x, x.x * c.x), fmaf(with.y, s.y, x.y * c.y)};
      return dim < p.rotary_dim ? turned : x;
    }
  };
};

}  // namespace gqa
