// Operands of both types of 8 bits. Caches hold pairs of them, and are copied, laid out in tiles
// and read by ldmatrix as if a pair were an element of 16 bits. The MMA multiplies float16, which
// has all of their numbers, whatever the queries are.
//
// What ldmatrix gives a lane of K is four neighbouring dims of a token, where two of float16 were:
// the MMA's k runs over them in another order, which the queries follow. Of V transposed it is two
// dims of two tokens, whose bytes change places: an MMA's rows are the even dims of 16, then the
// odd ones.
//
// A key counts k_scale times what is stored, and a value v_scale times that: the first is a factor
// of every product, before it is capped, the second one of the output.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include <gqa/arch/fp8.cuh>
#include <gqa/arch/mma.cuh>
#include <gqa/arch/narrow.cuh>
#include <gqa/arch/tile.cuh>
#include <gqa/policy/slots.cuh>
#include <gqa/stage/combine.cuh>
#include <gqa/stage/prepare.cuh>
#include <gqa/stage/row.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

// The scales of a block's KV head and sequence: of a tensor, or one for all.
template <class T>
CUTE_DEVICE float key_scale(Params const& p, Work<T> const& w) {
  if (p.k_scales == nullptr) return p.k_scale;
  return p.k_scales[int64_t(w.batch) * p.k_scale_batch + int64_t(w.kv_head) * p.k_scale_head];
}
template <class T>
CUTE_DEVICE float value_scale(Params const& p, Work<T> const& w) {
  if (p.v_scales == nullptr) return p.v_scale;
  return p.v_scales[int64_t(w.batch) * p.v_scale_batch + int64_t(w.kv_head) * p.v_scale_head];
}

// What one lane has of a row, divided by its scale and rounded.
template <class T, class Format>
CUTE_DEVICE uint64_t quantised(Vector<T> const& vec, Divisor const& scale) {
  auto const* given = reinterpret_cast<typename T::Element const*>(&vec);
  float quotient[ceil_div(T::kVecWidth, 2) * 2] = {};
  CUTE_UNROLL
  for (int j = 0; j < T::kVecWidth; ++j) quotient[j] = scale.under(float(given[j]));
  uint64_t packed = 0;
  CUTE_UNROLL
  for (int j = 0; j < T::kVecWidth; j += 2) {
    packed |= uint64_t(Format::rounded(quotient[j], quotient[j + 1])) << 8 * j;
  }
  return packed;
}

// Whether half of the lanes hold a row.
template <class T, int kDims>
constexpr bool kTakesHalf = kDims <= T::kVecWidth * kWarpSize / 2;

// A new token's row: as it was given, and quantised. Keys begin with the first lane, values with
// the first of the other half where that is enough: then both are quantised at once.
template <class T, int kDims, bool is_value>
using RowInHalf = WarpRow<T, kDims, is_value && kTakesHalf<T, kDims> ? kWarpSize / 2 : 0>;

template <class T, int kDims, class Format, bool is_value = false>
struct QuantisedRow : RowInHalf<T, kDims, is_value> {
  using Base = RowInHalf<T, kDims, is_value>;
  using Bytes = cute::uint_bit_t<T::kVecWidth * 8>;

  Bytes bytes[Base::kPerLane];

  // Lanes that have no part of a row quantise with the others: zeros, then.
  CUTE_DEVICE void load(typename T::Element const* row) {
    if constexpr (kTakesHalf<T, kDims>) this->vec[0] = Vector<T>(0);
    Base::load(row);
  }
  CUTE_DEVICE void quantise(float scale) {
    Divisor const divisor(scale);
    this->for_each(
        [&](int i, int) { bytes[i] = Bytes(quantised<T, Format>(this->vec[i], divisor)); });
  }
  CUTE_DEVICE void store(uint16_t* row) const {
    this->for_each([&](int i, int at) { reinterpret_cast<Bytes*>(row)[at] = bytes[i]; });
  }
  template <class Tile>
  CUTE_DEVICE void store_to(uint16_t* tile, int row) const {
    this->for_each([&](int i, int at) {
      int const first = at * T::kVecWidth;
      auto* pair = place_in_tile<T, Tile>(tile, row, first / 2);
      *reinterpret_cast<Bytes*>(reinterpret_cast<uint8_t*>(pair) + first % 2) = bytes[i];
    });
  }
};

// The same of a key that is prepared, and rounded as queries are before it is divided.
template <class T, class Format>
struct QuantisedPreparedRow : PreparedRow<T> {
  uint16_t bytes[PreparedRow<T>::kCount];

  CUTE_DEVICE void quantise(float scale) {
    Divisor const divisor(scale);
    CUTE_UNROLL
    for (int i = 0; i < PreparedRow<T>::kCount; ++i) {
      float const low = divisor.under(float(this->pair[i][0]));
      float const high = divisor.under(float(this->pair[i][1]));
      bytes[i] = uint16_t(Format::rounded(low, high));
    }
  }
  CUTE_DEVICE void store(uint16_t* row) const {
    this->for_each_at([&](int dim, int i) { row[dim / 2] = bytes[i]; });
  }
  template <class Tile>
  CUTE_DEVICE void store_to(uint16_t* tile, int row) const {
    this->for_each_at(
        [&](int dim, int i) { *place_in_tile<T, Tile>(tile, row, dim / 2) = bytes[i]; });
  }
};

// What products count. Queries in bfloat16 become float16, divided by a power of two per head,
// which products are multiplied by.
template <class T, Math = T::kMath>
struct Fp8KeyScale {
  static constexpr bool kNarrows = cute::is_same_v<typename T::Element, cutlass::bfloat16_t>;

  float factor[kNarrows ? T::kLaneHeads : 1];

  template <int kSteps, int kHeadTiles>
  CUTE_DEVICE void narrow(uint32_t (&query)[kSteps][kHeadTiles][2]) {
    factor[0] = 1.f;
    if constexpr (kNarrows) {
      int const lane = threadIdx.x % kWarpSize;
      CUTE_UNROLL
      for (int n = 0; n < kHeadTiles; ++n) {
        float const divisor = narrow_head(query, n);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          factor[2 * n + i] = __shfl_sync(0xffffffffu, divisor, (lane % 4 * 2 + i) * 4);
        }
      }
    }
  }
  CUTE_DEVICE void take_scale(Params const& p, Work<T> const& w) {
    float const scale = key_scale(p, w);
    CUTE_UNROLL
    for (float& each : factor) each *= scale;
  }
  CUTE_DEVICE float scaled(float dot, int head) const { return dot * factor[kNarrows ? head : 0]; }

 private:
  // Makes the lane's part of one head's query float16; returns what it was divided by.
  template <int kSteps, int kHeadTiles>
  CUTE_DEVICE static float narrow_head(uint32_t (&query)[kSteps][kHeadTiles][2], int n) {
    uint32_t pair[2] = {};  // two halve the chain
    CUTE_UNROLL
    for (int i = 0; i < kSteps * 2; ++i) {
      pair[i / 2 % 2] = max_of_bfloat16(pair[i / 2 % 2], query[i / 2][n][i % 2] & 0x7fff7fff);
    }
    pair[0] = max_of_bfloat16(pair[0], pair[1]);
    uint32_t largest = max(pair[0] >> 16, pair[0] & 0xffff);  // bits are ordered as numbers are
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    Narrowing const narrowed(largest);
    CUTE_UNROLL
    for (int i = 0; i < kSteps * 2; ++i) {
      query[i / 2][n][i % 2] = narrowed(query[i / 2][n][i % 2]);
    }
    return narrowed.divisor();
  }
};

// On CUDA cores, which multiply float32.
template <class T>
struct Fp8KeyScale<T, Math::kSimt> {
  static constexpr bool kNarrows = false;

  float factor;

  CUTE_DEVICE void take_scale(Params const& p, Work<T> const& w) { factor = key_scale(p, w); }
  CUTE_DEVICE float scaled(float dot, int) const { return dot * factor; }
};

// Members as those of NativeOperands.
template <class T, class Format>
struct Fp8Operands {
  static constexpr int kPacked = 2;

  using KeyTokenRow = QuantisedRow<T, T::kHeadDim, Format>;
  using ValueTokenRow = QuantisedRow<T, T::kHeadDimV, Format, true>;
  using PreparedTokenRow = QuantisedPreparedRow<T, Format>;
  template <class Key>
  CUTE_DEVICE static void quantise_key(Params const& p, Work<T> const& w, Key& key) {
    key.quantise(key_scale(p, w));
  }
  template <class Value>
  CUTE_DEVICE static void quantise_value(Params const& p, Work<T> const& w, Value& value) {
    value.quantise(value_scale(p, w));
  }
  struct NewScales {
    float key, value;

    CUTE_DEVICE void load(Params const& p, Work<T> const& w) {
      key = key_scale(p, w);
      value = value_scale(p, w);
    }
  };
  template <class Key, class Value>
  CUTE_DEVICE static void quantise(NewScales const& scales, Key& key, Value& value) {
    if constexpr (kTakesHalf<T, T::kHeadDim> && kTakesHalf<T, T::kHeadDimV> && !kPreparesRows<T>) {
      bool const has_key = int(threadIdx.x) % kWarpSize < kWarpSize / 2;
      Divisor const divisor(has_key ? scales.key : scales.value);
      auto vec = key.vec[0];
      if (!has_key) vec = value.vec[0];
      uint64_t const bytes = quantised<T, Format>(vec, divisor);
      key.bytes[0] = value.bytes[0] = typename Value::Bytes(bytes);
    } else {
      key.quantise(scales.key);
      value.quantise(scales.value);
    }
  }

  using KeyScale = Fp8KeyScale<T>;
  template <int kWidth>
  CUTE_DEVICE static void scale_values(Params const& p, Work<T> const& w, Merged<kWidth>& r) {
    float const scale = value_scale(p, w);
    CUTE_UNROLL
    for (int i = 0; i < kWidth; ++i) r.out[i] *= scale;
  }

  CUTE_DEVICE static int query_dim(int i, int quarter) {
    return i / 2 * 16 + quarter * 4 + i % 2 * 2;
  }
  CUTE_DEVICE static bool is_padding(int i, int quarter) {
    return query_dim(i, quarter) >= T::kHeadDim;
  }
  static constexpr int kHalfStep = 1;
  static constexpr int kRowStep = 2;

  // 16 tokens and twice 16 dims at a time.
  template <class Row, int kSteps, int kHeadTiles>
  CUTE_DEVICE static void add_keys(Row const& row, uint32_t const (&query)[kSteps][kHeadTiles][2],
                                   float (&sum)[2][kHeadTiles][4]) {
    CUTE_UNROLL
    for (int first = 0; first < kSteps; first += 2) {
      uint32_t four[4];
      cute::SM75_U32x4_LDSM_N::copy(row[first / 2], four[0], four[1], four[2], four[3]);
      CUTE_UNROLL
      for (int i = 0; i < 2 && first + i < kSteps; ++i) {
        uint32_t k[4];
        Format::halves(four[2 * i], k[0], k[2]);
        Format::halves(four[2 * i + 1], k[1], k[3]);
        CUTE_UNROLL
        for (int n = 0; n < kHeadTiles; ++n) {
          mma<cutlass::half_t>(sum[i][n], k, query[first + i][n]);
        }
      }
    }
  }
  template <class Row, int kDimTiles, int kHeadTiles>
  CUTE_DEVICE static void add_values(Row const& row, uint32_t const (&p)[kHeadTiles][2],
                                     float (&out)[kDimTiles][kHeadTiles][4]) {
    CUTE_UNROLL
    for (int first = 0; first < kDimTiles; first += 2) {
      uint32_t four[4];
      cute::SM75_U16x8_LDSM_T::copy(row[first / 2], four[0], four[1], four[2], four[3]);
      CUTE_UNROLL
      for (int i = 0; i < 2 && first + i < kDimTiles; ++i) {
        uint32_t v[4];
        by_dim(four[i], v[0], v[1]);
        by_dim(four[2 + i], v[2], v[3]);
        CUTE_UNROLL
        for (int n = 0; n < kHeadTiles; ++n) mma<cutlass::half_t>(out[first + i][n], v, p[n]);
      }
    }
  }
  CUTE_DEVICE static void value_fragment(cute::uint128_t const& row, uint32_t (&v)[4]) {
    uint32_t four[2];
    cute::SM75_U16x4_LDSM_T::copy(row, four[0], four[1]);
    by_dim(four[0], v[0], v[1]);
    by_dim(four[1], v[2], v[3]);
  }
  CUTE_DEVICE static cute::uint128_t const& value_row(uint16_t const* values, int dim_tile) {
    int const token = int(threadIdx.x) % 16;
    TileRow<T, typename T::ValueTile> const row(values, token, dim_tile % 2);
    return row[dim_tile / 2];
  }
  // 16 dims of one key, which all lanes name.
  CUTE_DEVICE static void load_step(uint16_t const* row, int step, uint32_t (&part)[2]) {
    int const quarter = int(threadIdx.x) % 4;
    bool const padding = step * 16 + quarter * 4 >= T::kHeadDim;
    uint32_t const four = padding ? 0u : reinterpret_cast<uint32_t const*>(row)[step * 4 + quarter];
    Format::halves(four, part[0], part[1]);
  }
  CUTE_DEVICE static float number(uint16_t const* row, int dim) {
    float2 const two = floats<Format>(row[dim / 2]);
    return dim % 2 == 0 ? two.x : two.y;
  }

  template <int kCount>
  struct Numbers {
    alignas(kCount) uint16_t pair[kCount / 2];

    CUTE_DEVICE explicit Numbers(uint16_t const* source) {
      using Vec = cute::uint_bit_t<kCount * 8>;
      *reinterpret_cast<Vec*>(pair) = *reinterpret_cast<Vec const*>(source);
    }
    CUTE_DEVICE float operator[](int i) const {
      float2 const two = floats<Format>(pair[i / 2]);
      return i % 2 == 0 ? two.x : two.y;
    }
  };

 private:
  // Two dims of two tokens: the tokens of the even dim, and those of the odd one.
  CUTE_DEVICE static void by_dim(uint32_t four, uint32_t& even, uint32_t& odd) {
    Format::halves(__byte_perm(four, 0, 0x3120), even, odd);
  }
};

}  // namespace gqa
