// Stage 4, value: O^T += V^T P^T, and the warp's partial output.
#pragma once

#include <gqa/arch/mma.cuh>
#include <gqa/arch/tile.cuh>
#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct SharedStorage;

template <class T, Math = T::kMath>
struct Accumulator;

// Tensor cores. P is rounded to the input type for the MMA.
template <class T>
struct Accumulator<T, Math::kTensorOp> {
  static constexpr int kDimTiles = ceil_div(T::kHeadDimV, 16);
  static constexpr int kHeadTiles = T::kBlockH / 8;
  static constexpr int kTokenTiles = T::kBlockN / 16;
  using Operands = OperandsOf<T>;
  // Whether only some lanes have dims of the last tile.
  static constexpr bool kLanesDiffer = Operands::kRowStep > 1 && T::kHeadDimV % 16 != 0;

  float out[kDimTiles][kHeadTiles][4] = {};  // O^T: dims on M, heads on N

  CUTE_DEVICE Accumulator() {}
  CUTE_DEVICE explicit Accumulator(SharedStorage<T>&) {}

  CUTE_DEVICE void rescale(float const (&factor)[T::kLaneHeads]) {
    CUTE_UNROLL
    for (int n = 0; n < kHeadTiles; ++n) {
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        CUTE_UNROLL
        for (int m = 0; m < kDimTiles; ++m) out[m][n][i] *= factor[2 * n + i % 2];
      }
    }
  }

  CUTE_DEVICE void add(typename T::Stored const* values,
                       float const (&probability)[T::kLaneHeads][T::kLaneTokens]) {
    int const lane = threadIdx.x % kWarpSize;
    CUTE_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      uint32_t p[kHeadTiles][2];
      probability_operand<T>(probability, 2 * t, p);
      TileRow<T, typename T::ValueTile> const row(values, t * 16 + lane / 16 * 8 + lane % 8,
                                                  lane / 8 % 2);
      Operands::add_values(row, p, out);
    }
  }

  // As [dim][head], the order in which lanes hold it: stores of a warp are contiguous.
  CUTE_DEVICE void store_by_dim(float* o_partial) const {
    int const lane = threadIdx.x % kWarpSize;
    CUTE_UNROLL
    for (int n = 0; n < kHeadTiles; ++n) {
      CUTE_UNROLL
      for (int m = 0; m < kDimTiles; ++m) {
        CUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
          int const dim = m * 16 + half * Operands::kHalfStep + lane / 4 * Operands::kRowStep;
          bool const padding =
              kLanesDiffer ? dim >= T::kHeadDimV : m * 16 + half * 8 >= T::kHeadDimV;
          if (!padding) {
            *reinterpret_cast<float2*>(&o_partial[dim * T::kBlockH + T::head_of(lane, 2 * n)]) =
                make_float2(out[m][n][2 * half], out[m][n][2 * half + 1]);
          }
        }
      }
    }
  }

  CUTE_DEVICE void store(float* o_partial) const {
    int const lane = threadIdx.x % kWarpSize;
    CUTE_UNROLL
    for (int n = 0; n < kHeadTiles; ++n) {
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        int const head = T::head_of(lane, 2 * n + i % 2);
        CUTE_UNROLL
        for (int m = 0; m < kDimTiles; ++m) {
          int const dim = m * 16 + i / 2 * Operands::kHalfStep + lane / 4 * Operands::kRowStep;
          bool const padding =
              kLanesDiffer ? dim >= T::kHeadDimV : m * 16 + i / 2 * 8 >= T::kHeadDimV;
          if (!padding) o_partial[head * T::kPartialPitch + dim] = out[m][n][i];
        }
      }
    }
  }
};

// CUDA cores: a lane owns every 32nd pair of dims and walks the tile's tokens.
template <class T>
struct Accumulator<T, Math::kSimt> {
  static constexpr int kPairs = ceil_div(T::kHeadDimV / 2, kWarpSize);

  SharedStorage<T>& shared;
  float out[kPairs][T::kBlockH][2] = {};

  CUTE_DEVICE explicit Accumulator(SharedStorage<T>& storage) : shared(storage) {}

  CUTE_DEVICE void rescale(float const (&factor)[T::kLaneHeads]) {
    CUTE_UNROLL
    for (int h = 0; h < T::kBlockH; ++h) {
      CUTE_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        out[i][h][0] *= factor[h];
        out[i][h][1] *= factor[h];
      }
    }
  }

  CUTE_DEVICE void add(typename T::Stored const* values,
                       float const (&probability)[T::kLaneHeads][T::kLaneTokens]) {
    int const lane = threadIdx.x % kWarpSize;
    auto& p = shared.probability[threadIdx.x / kWarpSize];
    __syncwarp();  // the previous tile's probabilities have been read
    CUTE_UNROLL
    for (int h = 0; h < T::kBlockH; ++h) {
      if (lane < T::kBlockN) p[h][lane] = probability[h][0];
    }
    __syncwarp();
    CUTE_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      int const dim = 2 * (lane + i * kWarpSize);
      if (T::kHeadDimV % (2 * kWarpSize) == 0 || dim < T::kHeadDimV)
        add_pair(values, dim, p, out[i]);
    }
  }

  CUTE_DEVICE void store(float* o_partial) const {
    int const lane = threadIdx.x % kWarpSize;
    CUTE_UNROLL
    for (int h = 0; h < T::kBlockH; ++h) {
      CUTE_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        int const dim = 2 * (lane + i * kWarpSize);
        if (T::kHeadDimV % (2 * kWarpSize) == 0 || dim < T::kHeadDimV) {
          *reinterpret_cast<float2*>(&o_partial[h * T::kPartialPitch + dim]) =
              make_float2(out[i][h][0], out[i][h][1]);
        }
      }
    }
  }

 private:
  CUTE_DEVICE static void add_pair(typename T::Stored const* values, int dim,
                                   float const (&p)[T::kBlockH][T::kBlockN],
                                   float (&acc)[T::kBlockH][2]) {
    CUTE_UNROLL
    for (int t = 0; t < T::kBlockN; t += 4) {
      float v[4][2];
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        typename OperandsOf<T>::template Numbers<2> const pair(
            values + typename T::ValueTile::Layout{}(t + i, dim / T::kPacked));
        v[i][0] = pair[0];
        v[i][1] = pair[1];
      }
      CUTE_UNROLL
      for (int h = 0; h < T::kBlockH; ++h) {
        float4 const w = *reinterpret_cast<float4 const*>(&p[h][t]);
        CUTE_UNROLL
        for (int e = 0; e < 2; ++e) {
          acc[h][e] = fmaf(w.x, v[0][e], acc[h][e]);
          acc[h][e] = fmaf(w.y, v[1][e], acc[h][e]);
          acc[h][e] = fmaf(w.z, v[2][e], acc[h][e]);
          acc[h][e] = fmaf(w.w, v[3][e], acc[h][e]);
        }
      }
    }
  }
};

}  // namespace gqa
