// Operands: elements of the type that the MMA multiplies.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include <gqa/arch/mma.cuh>
#include <gqa/arch/tile.cuh>
#include <gqa/policy/slots.cuh>
#include <gqa/stage/combine.cuh>
#include <gqa/stage/prepare.cuh>
#include <gqa/stage/row.cuh>

namespace gqa {

template <class T>
struct NativeOperands {
  using Stored = typename T::Element;
  using Multiplied = typename T::Element;
  static constexpr int kPacked = 1;  // elements in what is stored

  // The new token is stored as it is.
  struct NewScales {
    CUTE_DEVICE void load(Params const&, Work<T> const&) {}
  };
  using KeyTokenRow = WarpRow<T, T::kHeadDim>;
  using ValueTokenRow = WarpRow<T, T::kHeadDimV>;
  using PreparedTokenRow = PreparedRow<T>;
  template <class Key>
  CUTE_DEVICE static void quantise_key(Params const&, Work<T> const&, Key&) {}
  template <class Value>
  CUTE_DEVICE static void quantise_value(Params const&, Work<T> const&, Value&) {}
  template <class Key, class Value>
  CUTE_DEVICE static void quantise(NewScales const&, Key&, Value&) {}

  // Products are what they are, and so are outputs.
  struct KeyScale {
    static constexpr bool kNarrows = false;

    template <class Query>
    CUTE_DEVICE void narrow(Query&) {}
    CUTE_DEVICE void take_scale(Params const&, Work<T> const&) {}
    CUTE_DEVICE float scaled(float dot, int) const { return dot; }
  };
  template <int kWidth>
  CUTE_DEVICE static void scale_values(Params const&, Work<T> const&, Merged<kWidth>&) {}

  // From one of a lane's two rows of 16 dims of V^T to the other, and from one lane's to the next.
  static constexpr int kHalfStep = 8;
  static constexpr int kRowStep = 1;
  // The dims of a lane's i-th pair of query elements, the B operand.
  CUTE_DEVICE static int query_dim(int i, int quarter) { return i * 8 + quarter * 2; }
  CUTE_DEVICE static bool is_padding(int i, int) { return i * 8 >= T::kHeadDim; }

  // Adds the products of 16 tokens of K, the A operand: two independent sums halve the chain of
  // dependent MMAs. `row` is this lane's of 16, and its half of 16 dims.
  template <class Row, int kSteps, int kHeadTiles>
  CUTE_DEVICE static void add_keys(Row const& row, uint32_t const (&query)[kSteps][kHeadTiles][2],
                                   float (&sum)[2][kHeadTiles][4]) {
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t k[4];
      cute::SM75_U32x4_LDSM_N::copy(row[step], k[0], k[1], k[2], k[3]);
      CUTE_UNROLL
      for (int n = 0; n < kHeadTiles; ++n) mma<Multiplied>(sum[step % 2][n], k, query[step][n]);
    }
  }
  // The same of V^T, 16 dims after the other.
  template <class Row, int kDimTiles, int kHeadTiles>
  CUTE_DEVICE static void add_values(Row const& row, uint32_t const (&p)[kHeadTiles][2],
                                     float (&out)[kDimTiles][kHeadTiles][4]) {
    CUTE_UNROLL
    for (int m = 0; m < kDimTiles; ++m) {
      uint32_t v[4];
      value_fragment(row[m], v);
      CUTE_UNROLL
      for (int n = 0; n < kHeadTiles; ++n) mma<Multiplied>(out[m][n], v, p[n]);
    }
  }
  // A tile of 16 dims and 16 tokens, and where this lane's row of it is.
  CUTE_DEVICE static void value_fragment(cute::uint128_t const& row, uint32_t (&v)[4]) {
    cute::SM75_U16x8_LDSM_T::copy(row, v[0], v[1], v[2], v[3]);
  }
  CUTE_DEVICE static cute::uint128_t const& value_row(Stored const* values, int dim_tile) {
    int const lane = threadIdx.x % kWarpSize;
    TileRow<T, typename T::ValueTile> const row(values, lane / 16 * 8 + lane % 8, lane / 8 % 2);
    return row[dim_tile];
  }
  // 16 dims of 8 rows of K in shared memory; `row` is this lane's, counted modulo 8.
  CUTE_DEVICE static void load_step(Stored const* row, int step, uint32_t (&part)[2]) {
    bool const padded = (2 * step + 1) * kChunk >= T::kHeadDim;
    int const chunk = padded ? 2 * step : 2 * step + int(threadIdx.x) / 8 % 2;
    cute::SM75_U32x2_LDSM_N::copy(*reinterpret_cast<cute::uint128_t const*>(row + chunk * kChunk),
                                  part[0], part[1]);
    if (padded) part[1] = 0u;
  }
  CUTE_DEVICE static float number(Stored const* row, int dim) { return float(row[dim]); }

  // Neighbours in shared memory, on CUDA cores.
  template <int kCount>
  struct Numbers {
    alignas(kCount * sizeof(Stored)) Stored number[kCount];

    CUTE_DEVICE explicit Numbers(Stored const* source) {
      using Vec = cute::uint_bit_t<kCount * sizeof(Stored) * 8>;
      *reinterpret_cast<Vec*>(number) = *reinterpret_cast<Vec const*>(source);
    }
    CUTE_DEVICE float operator[](int i) const { return float(number[i]); }
  };
};

}  // namespace gqa
