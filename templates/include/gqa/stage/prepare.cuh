// Before stage 2: queries and new keys are normed, then rotated, and rounded once.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include <gqa/policy/slots.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

template <class T>
constexpr bool kPreparesRows = !NormOf<T>::none() || !RotaryOf<T>::none();

// The position by which a query is rotated, or a new key.
template <class T>
CUTE_DEVICE int query_position(Params const& p, Work<T> const& w, int row) {
  if constexpr (RotaryOf<T>::none()) {
    return 0;
  } else {
    int const first = RotaryOf<T>::first_position(p, w.batch, w.num_cached);
    return clamped_position(p, w, kOneQuery<T> ? first : first + w.token_of(row) * p.rotary_step);
  }
}
template <class T>
CUTE_DEVICE int key_position(Params const& p, Work<T> const& w, int token) {
  if constexpr (RotaryOf<T>::none()) {
    return 0;
  } else {
    return clamped_position(p, w, RotaryOf<T>::first_position(p, w.batch, w.num_cached) + token);
  }
}

// One that the tables have: sequences that are inactive, or not valid, may have others.
template <class T>
CUTE_DEVICE int clamped_position(Params const& p, Work<T> const&, int position) {
  return max(0, min(position, p.rotary_positions - 1));
}

// A row of a head in global memory, as it enters the product. kLanes neighbouring lanes have it
// together; every second dim and the one behind it are asked for as a pair.
template <class T, int kLanes>
class PreparedRow {
 public:
  using Element = typename T::Element;
  using Pair = cutlass::Array<Element, 2>;

  CUTE_DEVICE PreparedRow(Params const& p, Side side, Element const* row, int position)
      : params_(p), row_(row), position_(position), factors_(p, side, sum_of_squares(row)) {}

  CUTE_DEVICE Pair rounded(int dim) const {
    float2 const x = RotaryOf<T>::turned(params_, position_, dim,
                                         [&](int at) { return factors_(pair(row_, at), at); });
    cutlass::Array<float, 2> const values = {x.x, x.y};
    return cutlass::NumericArrayConverter<Element, float, 2>{}(values);
  }
  CUTE_DEVICE uint32_t packed(int dim) const {
    Pair const pair = rounded(dim);
    return reinterpret_cast<uint32_t const&>(pair);
  }

 private:
  CUTE_DEVICE static float2 pair(Element const* row, int dim) {
    if constexpr (T::kVecWidth >= 2) {
      auto const both = *reinterpret_cast<Pair const*>(row + dim);
      return {float(both[0]), float(both[1])};
    } else {
      return {float(row[dim]), float(row[dim + 1])};
    }
  }

  CUTE_DEVICE static float sum_of_squares(Element const* row) {
    float sum = 0.f;
    if constexpr (!NormOf<T>::none()) {
      CUTE_UNROLL
      for (int i = 0; i < ceil_div(T::kHeadDim, 2 * kLanes); ++i) {
        int const dim = 2 * (i * kLanes + int(threadIdx.x) % kLanes);
        float2 const x = dim < T::kHeadDim ? pair(row, dim) : float2{0.f, 0.f};
        sum = fmaf(x.x, x.x, fmaf(x.y, x.y, sum));
      }
      CUTE_UNROLL
      for (int bit = kLanes / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
    }
    return sum;
  }

  Params const& params_;
  Element const* row_;
  int position_;
  typename NormOf<T>::Factors factors_;
};

}  // namespace gqa
