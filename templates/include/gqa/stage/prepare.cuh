// Before stage 2: queries and new keys are normed, then rotated, and rounded once.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include <gqa/policy/slots.cuh>
#include <gqa/stage/row.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

// The position by which a query is rotated, or a new key; one that the tables have, for sequences
// that are inactive, or not valid, may have others.
template <class T>
CUTE_DEVICE int position_of(Params const& p, Work<T> const& w, int token) {
  int const position = RotaryOf<T>::first_position(p, w.batch, w.num_cached) + token;
  return max(0, min(position, p.rotary_positions - 1));
}
template <class T>
CUTE_DEVICE int query_position(Params const& p, Work<T> const& w, int row) {
  return position_of(p, w, kOneQuery<T> ? 0 : w.token_of(row) * p.rotary_step);
}

// A row of a head as it enters the product, in the registers of a warp: pairs of neighbouring dims,
// lane by lane. All that is read is asked for at once.
template <class T>
struct PreparedRow {
  using Element = typename T::Element;
  using Pair = cutlass::Array<Element, 2>;

  static constexpr int kCount = ceil_div(T::kHeadDim, 2 * kWarpSize);

  Pair pair[kCount];

  // Of a row in global memory. All lanes take part.
  CUTE_DEVICE void prepare(Params const& p, Side side, Element const* row, int position) {
    int dims[kCount];  // those behind the last take the first
    float2 x[kCount];
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      dims[i] = dim_of(i) < T::kHeadDim ? dim_of(i) : 0;
      x[i] = load(row, dims[i]);
    }
    typename NormOf<T>::template Weights<kCount> const weights(p, side, dims);
    if constexpr (RotaryOf<T>::none()) {
      float const factor = weights.factor(p, sum_of_squares(x));
      CUTE_UNROLL
      for (int i = 0; i < kCount; ++i) round(weights.normed(p, x[i], factor, i), i);
    } else {
      int others[kCount];
      float2 y[kCount];
      CUTE_UNROLL
      for (int i = 0; i < kCount; ++i) {
        others[i] = RotaryOf<T>::other(p, dims[i]);
        y[i] = load(row, others[i]);
      }
      typename NormOf<T>::template Weights<kCount> const other_weights(p, side, others);
      typename RotaryOf<T>::template Angles<kCount> const angles(p, position, dims);
      float const factor = weights.factor(p, sum_of_squares(x));
      CUTE_UNROLL
      for (int i = 0; i < kCount; ++i) {
        float2 const normed = weights.normed(p, x[i], factor, i);
        float2 const other = other_weights.normed(p, y[i], factor, i);
        round(angles.turned(p, normed, other, dims[i], i), i);
      }
    }
  }

  CUTE_DEVICE void store(Element* row) const {
    for_each([&](int dim, Pair const& value) { put<T::kVecWidth>(row + dim, value); });
  }
  // Into the row of a tile.
  template <class Tile>
  CUTE_DEVICE void store_to(Element* tile, int row) const {
    for_each(
        [&](int dim, Pair const& value) { put<2>(place_in_tile<T, Tile>(tile, row, dim), value); });
  }

  // Calls with the first dim of each pair of this lane, and with the pair, or its number.
  template <class Visit>
  CUTE_DEVICE void for_each(Visit&& visit) const {
    for_each_at([&](int dim, int i) { visit(dim, pair[i]); });
  }
  template <class Visit>
  CUTE_DEVICE static void for_each_at(Visit&& visit) {
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (dim_of(i) < T::kHeadDim) visit(dim_of(i), i);
    }
  }

 private:
  CUTE_DEVICE static int dim_of(int i) {
    return 2 * (i * kWarpSize + int(threadIdx.x) % kWarpSize);
  }

  CUTE_DEVICE static float2 load(Element const* row, int dim) {
    if constexpr (T::kVecWidth >= 2) {
      auto const both = *reinterpret_cast<Pair const*>(row + dim);
      return {float(both[0]), float(both[1])};
    } else {
      return {float(row[dim]), float(row[dim + 1])};
    }
  }
  template <int kAligned>
  CUTE_DEVICE static void put(Element* target, Pair const& value) {
    if constexpr (kAligned >= 2) {
      *reinterpret_cast<uint32_t*>(target) = reinterpret_cast<uint32_t const&>(value);
    } else {
      target[0] = value[0], target[1] = value[1];
    }
  }

  CUTE_DEVICE void round(float2 x, int i) {
    cutlass::Array<float, 2> values;
    values[0] = x.x, values[1] = x.y;
    pair[i] = cutlass::NumericArrayConverter<Element, float, 2>{}(values);
  }

  CUTE_DEVICE static float sum_of_squares(float2 const (&x)[kCount]) {
    float sum = 0.f;
    if constexpr (!NormOf<T>::none()) {
      CUTE_UNROLL
      for (int i = 0; i < kCount; ++i) {
        bool const exists = dim_of(i) < T::kHeadDim;
        sum += exists ? fmaf(x[i].x, x[i].x, x[i].y * x[i].y) : 0.f;
      }
      CUTE_UNROLL
      for (int bit = kWarpSize / 2; bit > 0; bit /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, bit);
      }
    }
    return sum;
  }
};

template <class T>
CUTE_DEVICE void prepare_query(Params const& p, Work<T> const& w, int row,
                               typename T::Element const* source, PreparedRow<T>& prepared) {
  if constexpr (RotaryOf<T>::none()) {
    prepared.prepare(p, Side::kQuery, source, 0);
  } else {
    prepared.prepare(p, Side::kQuery, source, query_position(p, w, row));
  }
}

// Rows of a token that is stored: of a key as it is, or prepared, and of a value.
template <class T, bool prepared = kPreparesRows<T>>
struct KeyRowOf {
  using Type = typename OperandsOf<T>::KeyTokenRow;
};
template <class T>
struct KeyRowOf<T, true> {
  using Type = typename OperandsOf<T>::PreparedTokenRow;
};
template <class T>
using KeyRow = typename KeyRowOf<T>::Type;
template <class T>
using ValueRow = typename OperandsOf<T>::ValueTokenRow;

}  // namespace gqa
