// Operands of 8 bits whose scales are of tokens and KV heads, as the append computes them: the
// largest number of a new row becomes the last one of its type.
//
// Scales lie as tokens do, [rows, max_seq_len, num_kv_heads], or in pages, contiguous but for the
// first dimension. A product is multiplied by its key's scale before it is capped, a probability by
// its value's before it is rounded to float16: relative to the power of two below the largest so
// far, which the outputs are multiplied by in the end. 2^15 over that, the operands of values that
// count 2^-29 as much as others still are normal numbers.
//
// The largest probability is 1, and it is multiplied by what float16 has of its value's scale:
// where one token has all weight, nothing is rounded twice. The rest of the scale belongs to the
// token's score, as the logarithm of a factor, so that probabilities count it, but not their sum.
//
// Several new tokens have a scale each, which a row takes along into its tile: it lies in what
// keeps rows apart there, and the lane that has the row's scales finds it.
//
// What either schedule does with them stands in a header of its own: schedule/multistage/
// attend_of_tokens.cuh, schedule/tma/scales_of_tokens.cuh.
#pragma once

#include <gqa/policy/cache_paged.cuh>
#include <gqa/policy/element_fp8.cuh>
#include <gqa/stage/append.cuh>
#include <gqa/stage/score.cuh>
#include <gqa/stage/value.cuh>

namespace gqa {

// The largest magnitude of a warp's numbers, NaN being none. All lanes take part. Bits of what is
// not negative are in order.
CUTE_DEVICE float largest_of_warp(float number) {
  uint32_t const bits = __float_as_uint(fmaxf(fabsf(number), 0.f));
  return __uint_as_float(__reduce_max_sync(0xffffffffu, bits));
}

// The scale of a row, by the largest of this lane's numbers. All lanes take part.
template <class Format>
CUTE_DEVICE float scale_of_row(float largest) {
  largest = largest_of_warp(largest);
  return largest > 0.f ? __fdiv_rn(largest, Format::kMax) : 1.f;
}

// Where the scale of a row may be that is followed by another: between them.
template <class Tile>
CUTE_DEVICE float* scale_behind(uint16_t* row) {
  static_assert(Tile::kRowStride - Tile::kDimsPadded == kChunk);
  return reinterpret_cast<float*>(row + Tile::kDimsPadded);
}

// Where those of a warp's tile are if the copy engine writes it, which leaves no room between rows.
template <class T>
CUTE_DEVICE float* scales_of_warp();

// Where the scale of a tile's row is.
template <class T, class Tile>
CUTE_DEVICE float* scale_in_tile(uint16_t* tile, int row) {
  if constexpr (T::kTma) {
    return scales_of_warp<T>() + row;
  } else {
    return reinterpret_cast<float*>(tile + typename Tile::Layout{}(row, Tile::kDimsPadded));
  }
}

// A new token's row, with a scale of its own.
template <class T, int kDims, class Format, bool is_value = false>
struct ScaledRow : QuantisedRow<T, kDims, Format, is_value> {
  float scale;

  CUTE_DEVICE void quantise_by_largest() {
    float largest = 0.f;
    this->for_each([&](int i, int) {
      auto const* given = reinterpret_cast<typename T::Element const*>(&this->vec[i]);
      CUTE_UNROLL
      for (int j = 0; j < T::kVecWidth; ++j) largest = fmaxf(largest, fabsf(float(given[j])));
    });
    scale = scale_of_row<Format>(largest);
    this->quantise(scale);
  }
  template <class Tile>
  CUTE_DEVICE void store_to(uint16_t* tile, int row) const {
    QuantisedRow<T, kDims, Format, is_value>::template store_to<Tile>(tile, row);
    if (int(threadIdx.x) % kWarpSize == 0) *scale_in_tile<T, Tile>(tile, row) = scale;
  }
};
template <class T, class Format>
struct ScaledPreparedRow : QuantisedPreparedRow<T, Format> {
  float scale;

  CUTE_DEVICE void quantise_by_largest() {
    float largest = 0.f;
    this->for_each_at([&](int, int i) {
      CUTE_UNROLL
      for (int j = 0; j < 2; ++j) largest = fmaxf(largest, fabsf(float(this->pair[i][j])));
    });
    scale = scale_of_row<Format>(largest);
    this->quantise(scale);
  }
  template <class Tile>
  CUTE_DEVICE void store_to(uint16_t* tile, int row) const {
    QuantisedPreparedRow<T, Format>::template store_to<Tile>(tile, row);
    if (int(threadIdx.x) % kWarpSize == 0) *scale_in_tile<T, Tile>(tile, row) = scale;
  }
};

// Products count what queries say: keys' scales are not those of a block.
template <class T>
struct TokensKeyScale : Fp8KeyScale<T> {
  CUTE_DEVICE void take_scale(Params const&, Work<T> const&) {}
};

template <class T, class Format>
struct TokensOperands : Fp8Operands<T, Format> {
  using KeyTokenRow = ScaledRow<T, T::kHeadDim, Format>;
  using ValueTokenRow = ScaledRow<T, T::kHeadDimV, Format, true>;
  using PreparedTokenRow = ScaledPreparedRow<T, Format>;
  template <class Row>
  CUTE_DEVICE static void quantise_key(Params const&, Work<T> const&, Row& key) {
    key.quantise_by_largest();
  }
  template <class Row>
  CUTE_DEVICE static void quantise_value(Params const&, Work<T> const&, Row& value) {
    value.quantise_by_largest();
  }
  struct NewScales {
    CUTE_DEVICE void load(Params const&, Work<T> const&) {}
  };
  template <class Key, class Value>
  CUTE_DEVICE static void quantise(NewScales const&, Key& key, Value& value) {
    key.quantise_by_largest();
    value.quantise_by_largest();
  }
  using KeyScale = TokensKeyScale<T>;
  template <int kWidth>
  CUTE_DEVICE static void scale_values(Params const&, Work<T> const&, Merged<kWidth>&) {}
  // Of the new token's value, whose scale lies behind its row.
  CUTE_DEVICE static float number(uint16_t* row, int dim) {
    float const scale = *scale_behind<typename T::ValueTile>(row);
    return Fp8Operands<T, Format>::number(row, dim) * scale;
  }
};

template <class T>
struct E4m3OfTokens : TokensOperands<T, E4m3> {
  using Stored = uint16_t;
  using Multiplied = cutlass::half_t;
};
template <class T>
struct E5m2OfTokens : TokensOperands<T, E5m2> {
  using Stored = uint16_t;
  using Multiplied = cutlass::half_t;
};

// The scales of a tile: a lane has those of one token, the tile's row of its number.
template <class T>
class TokenScales {
 public:
  static_assert(T::kBlockN <= kWarpSize && T::kTensorOp);

  float key, value;  // 1 and 0 where there is no token
  float rest = 0.f;  // the share of the value's scale that `value` does not have

  CUTE_DEVICE TokenScales(Params const& p, Work<T> const& w) : params_(p), work_(w) {}

  CUTE_DEVICE void load(int tile) {
    int const row = int(threadIdx.x) % kWarpSize;
    int const token = tile * T::kBlockN + row;
    key = 1.f, value = 0.f;
    bool const is_read = tile < work_.num_tiles && row < T::kBlockN && token < work_.num_cached &&
                         token >= work_.first_token;
    if (!is_read) return;
    int first = work_.cache_row(), place = token;
    if constexpr (!CacheOf<T>::by_number()) {
      first = table_row(params_, first)[page_of(params_, token)];
      place = place_in_page(params_, token);
      if (!is_in_pool(params_, first)) return;
    }
    key = params_.k_scales[index(params_.k_scale_batch, first, place)];
    value = params_.v_scales[index(params_.v_scale_batch, first, place)];
  }
  // The new token is the tile's row of this number.
  CUTE_DEVICE void put(int row, NewToken<T> const& token) {
    bool const own = int(threadIdx.x) % kWarpSize == row;
    key = own ? token.key.scale : key;
    value = own ? token.value.scale : value;
  }
  // Leaves of values' scales what float16 has.
  CUTE_DEVICE void split_values() {
    float const kept = __uint_as_float(__float_as_uint(value) & kFractionOfHalf);
    float const share = (value - kept) * reciprocal_approx(value);
    rest = share < 1.f ? share : 0.f;  // none of zero, of 2^-126 and less, of no number
    value = kept;
  }
  // Into the cache, for which one warp per KV head calls.
  CUTE_DEVICE void append(NewToken<T> const& token) const {
    if (int(threadIdx.x) % kWarpSize != 0) return;
    write(token.row, 0, params_.k_scales, params_.k_scale_batch, token.key.scale);
    write(token.row, 0, params_.v_scales, params_.v_scale_batch, token.value.scale);
  }
  // Of several new tokens, those in a tile, which has their rows; into the cache, too, where this
  // block appends. All lanes take part.
  CUTE_DEVICE void take_keys(int tile, uint16_t* rows) {
    take<typename T::KeyTile>(tile, rows, params_.k_scales, params_.k_scale_batch, key);
  }
  CUTE_DEVICE void take_values(int tile, uint16_t* rows) {
    take<typename T::ValueTile>(tile, rows, params_.v_scales, params_.v_scale_batch, value);
  }
  CUTE_DEVICE Work<T> const& work() const { return work_; }

 private:
  static constexpr uint32_t kFractionOfHalf = 0xffffe000;  // and what stands before, of a float

  template <class Tile>
  CUTE_DEVICE void take(int tile, uint16_t* rows, float const* scales, int batch_stride,
                        float& scale) const {
    if (!NewTokens<T>::are_in(work_, tile)) return;
    bool const appends = work_.head_block == 0 && !NewTokens<T>::any_lost(params_, work_);
    int const row = int(threadIdx.x) % kWarpSize;
    int const number = tile * T::kBlockN + row - work_.num_cached;
    if (row >= T::kBlockN || number < 0 || number >= work_.new_tokens.count) return;
    scale = *scale_in_tile<T, Tile>(rows, row);
    if (!appends) return;
    typename CacheOf<T>::NewRow place;
    place.find(params_, work_, number);
    write(place, number, scales, batch_stride, scale);
  }
  CUTE_DEVICE void write(typename CacheOf<T>::NewRow const& row, int number, float const* scales,
                         int batch_stride, float scale) const {
    if (!row.exists(params_)) return;
    int first = work_.cache_row(), place = work_.num_cached + number;
    if constexpr (!CacheOf<T>::by_number()) first = row.page, place = row.place;
    const_cast<float*>(scales)[index(batch_stride, first, place)] = scale;
  }
  CUTE_DEVICE int64_t index(int batch_stride, int first, int place) const {
    return int64_t(first) * batch_stride + int64_t(place) * params_.num_kv_heads + work_.kv_head;
  }

  Params const& params_;
  Work<T> const& work_;
};

// Scores of a tile that has these scales, whose values' are split.
template <class T>
CUTE_DEVICE void score_tile(Scorer<T> const& score, typename T::Stored const* keys, TileEnd end,
                            Logits<T> const& logit, TokenScales<T>& scales,
                            float (&scores)[T::kLaneHeads][T::kLaneTokens]) {
  constexpr int kHeadTiles = Scorer<T>::kHeadTiles;
  constexpr float kLog2E = 1.44269504088896341f;  // of 1 / (1 - rest), nearly
  int const lane = threadIdx.x % kWarpSize;
  CUTE_UNROLL
  for (int m = 0; m < Scorer<T>::kTokenTiles; ++m) {
    float sum[2][kHeadTiles][4] = {};
    TileRow<T, typename T::KeyTile> const row(keys, m * 16 + lane % 16, lane / 16);
    OperandsOf<T>::add_keys(row, score.query, sum);
    if (m == 0) scales.split_values();
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      int const t = 2 * m + half;
      float const scale = __shfl_sync(0xffffffffu, scales.key, score.token(t));
      float const rest = __shfl_sync(0xffffffffu, scales.rest, score.token(t));
      CUTE_UNROLL
      for (int h = 0; h < T::kLaneHeads; ++h) {
        int const i = half * 2 + h % 2;
        float const dot = score.scaled(sum[0][h / 2][i] + sum[1][h / 2][i], h) * scale;
        scores[h][t] = fmaf(rest, kLog2E, logit(dot, h, end.at(score.token(t))));
      }
    }
  }
}

// What values' scales are relative to: a power of two, so that they stay what they are.
template <class T>
class ValueRange {
 public:
  // Multiplies a tile's probabilities by its values' scales, and takes out of this lane's sum what
  // the rest of scales has brought in. All lanes take part.
  CUTE_DEVICE void scale(TokenScales<T> const& scales, Accumulator<T>& acc,
                         float (&probability)[T::kLaneHeads][T::kLaneTokens],
                         float (&row_sum)[T::kLaneHeads]) {
    uint32_t const exponent = exponent_of(largest_of_warp(scales.value));
    if (exponent > exponent_) {
      uint32_t const grown = exponent - exponent_;
      multiply(acc, __uint_as_float(kOne > grown ? kOne - grown : 0));
      exponent_ = exponent;
    }
    scale(scales, probability, row_sum);
  }
  // The same where they are known to be in range.
  CUTE_DEVICE void scale(TokenScales<T> const& scales,
                         float (&probability)[T::kLaneHeads][T::kLaneTokens],
                         float (&row_sum)[T::kLaneHeads]) const {
    float const relative = scales.value * __uint_as_float(2 * kOne + kRoom - exponent_);
    CUTE_UNROLL
    for (int t = 0; t < T::kLaneTokens; ++t) {
      float const factor = __shfl_sync(0xffffffffu, relative, Scorer<T>::token(t));
      float const rest = __shfl_sync(0xffffffffu, scales.rest, Scorer<T>::token(t));
      CUTE_UNROLL
      for (int h = 0; h < T::kLaneHeads; ++h) {
        row_sum[h] = fmaf(probability[h][t], -rest, row_sum[h]);
        probability[h][t] *= factor;
      }
    }
  }
  // Makes the sums what they count.
  CUTE_DEVICE void finish(Accumulator<T>& acc) const { multiply(acc, unit()); }
  CUTE_DEVICE float unit() const { return __uint_as_float(exponent_ - kRoom); }

  // Before there are sums: makes it that of scales up to the largest.
  CUTE_DEVICE void cover(float largest) { exponent_ = max(exponent_, exponent_of(largest)); }

 private:
  // Exponents, where floats have them.
  static constexpr uint32_t kOne = 127u << 23;
  static constexpr uint32_t kRoom = 15u << 23;  // float16 has room for less than 2^16

  CUTE_DEVICE static uint32_t exponent_of(float number) {
    return __float_as_uint(number) & 0x7f800000;
  }
  CUTE_DEVICE static void multiply(Accumulator<T>& acc, float by) {
    float factor[T::kLaneHeads];
    CUTE_UNROLL
    for (float& f : factor) f = by;
    acc.rescale(factor);
  }

  uint32_t exponent_ = kRoom + (1u << 23);  // whose unit is a normal number
};

}  // namespace gqa
