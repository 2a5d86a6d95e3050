// The compile-time half of a kernel: what a variant states, and what follows from it.
#pragma once

#include <cuda/std/limits>
#include <cute/layout.hpp>
#include <cutlass/numeric_types.h>

namespace gqa {

constexpr int kWarpSize = 32;
constexpr int kChunk = 8;  // elements in 16 bytes, the widest access and the row of an 8x8 matrix

// Stands for the maximum of no scores. Finite, so that exp2(score - max) is never NaN by itself.
constexpr float kNoMax = -3.402823466e+38f;
constexpr float kInfinity = cuda::std::numeric_limits<float>::infinity();
constexpr float kNan = cuda::std::numeric_limits<float>::quiet_NaN();

enum class Math {
  kTensorOp,  // mma.sync m16n8k16
  kSimt,      // CUDA cores; needs no alignment beyond the element's
};

enum class Schedule {
  kMultistage,  // cp.async; splits meet in global memory
  kTma,         // tensor copies; the blocks of a cluster meet in each other's shared memory
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

constexpr int kBoxDims = 64;  // of what the copy engine writes at a time, rows of 128 bytes

// A tile of K or V in shared memory: kTokens rows of kDims elements, or pairs of narrower ones.
template <int kTokens, int kDims_, bool kTma>
struct Tile {
  static constexpr int kDims = kDims_;
  static constexpr int kDimsPadded = round_up(kDims, 16);  // what the MMA reads of a row

  // Rows lie an odd number of 16-byte chunks apart, so that the eight rows of an 8x8 matrix fall
  // into different banks whatever the head dimension.
  static constexpr int kRowStride = (kDimsPadded / kChunk | 1) * kChunk;
  using Layout = cute::Layout<cute::Shape<cute::Int<kTokens>, cute::Int<kDimsPadded>>,
                              cute::Stride<cute::Int<kRowStride>, cute::Int<1>>>;

  // The copy engine writes boxes instead, each kTokens rows of kBoxDims.
  static constexpr int kBoxes = ceil_div(kDims, kBoxDims);

  static constexpr int kElements = kTma ? kBoxes * kTokens * kBoxDims : kTokens * kRowStride;
};

// `Variant` is the struct that a generated file spells out: Element, kSchedule, kMath, kHeadDim,
// kHeadDimV, kGroupSize, kVecWidth, kBlockH, kBlockN, kNumWarps, kNumStages, kPdl.
template <class Variant>
struct Traits : Variant {
  using typename Variant::Element;
  using Variant::kBlockH;
  using Variant::kBlockN;
  using Variant::kGroupSize;
  using Variant::kHeadDim;   // of q and K
  using Variant::kHeadDimV;  // of V and the output
  using Variant::kMath;
  using Variant::kNumStages;
  using Variant::kNumWarps;
  using Variant::kSchedule;
  using Variant::kVecWidth;

  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kHeadBlocks = ceil_div(kGroupSize, kBlockH);  // blocks that share a KV head

  static constexpr bool kTma = kSchedule == Schedule::kTma;
  using Stored = typename Variant::template Operands<Variant>::Stored;  // 16 bits of a cache
  using Multiplied = typename Variant::template Operands<Variant>::Multiplied;  // by the MMA
  static constexpr int kPacked = Variant::template Operands<Variant>::kPacked;  // elements of those

  using KeyTile = Tile<kBlockN, kHeadDim / kPacked, kTma>;
  using ValueTile = Tile<kBlockN, kHeadDimV / kPacked, kTma>;
  static constexpr int kPairElements = KeyTile::kElements + ValueTile::kElements;
  static constexpr int kBoxRowBytes = kBoxDims * int(sizeof(Stored));
  static constexpr int kBoxBytes = kBlockN * kBoxRowBytes;

  // Partial outputs in shared memory, [head][dim] fp32. The pitch spreads the accumulator
  // fragments (4 head pairs x 8 dims) over all 32 banks.
  static constexpr int kPartialPitch = kHeadDimV + 4;

  static constexpr int kWarpRingBytes = kNumStages * kPairElements * int(sizeof(Stored));
  static constexpr int kWarpPartialBytes = kBlockH * kPartialPitch * int(sizeof(float));
  static constexpr int kWarpBytes =
      round_up(kWarpRingBytes > kWarpPartialBytes ? kWarpRingBytes : kWarpPartialBytes, 16);

  // How scores lie in a warp: every lane holds kLaneHeads x kLaneTokens of them; lanes that differ
  // in the bits kFirstLaneBit .. kLastLaneBit hold other tokens of the same heads.
  static constexpr bool kTensorOp = kMath == Math::kTensorOp;
  static constexpr int kLanesPerToken = kTensorOp ? 4 : kWarpSize / kBlockN;
  static constexpr int kLaneHeads = kTensorOp ? kBlockH / 4 : kBlockH;
  static constexpr int kLaneTokens = kTensorOp ? kBlockN / 8 : 1;
  static constexpr int kFirstLaneBit = kTensorOp ? 4 : 1;
  static constexpr int kLastLaneBit = kTensorOp ? 16 : kBlockN / 2;

  // Head of a lane's h-th score, and of the accumulators that belong to it.
  static constexpr int head_of(int lane, int h) {
    return kTensorOp ? h / 2 * 8 + lane % 4 * 2 + h % 2 : h;
  }

  static_assert(kHeadDim % 8 == 0 && kHeadDim >= 32 && kHeadDim <= 256);
  static_assert(kHeadDimV % 8 == 0 && kHeadDimV >= 32 && kHeadDimV <= 256);
  static_assert(kVecWidth == 8 || kVecWidth == 4 || kVecWidth == 2 ||
                (kVecWidth == 1 && !kTensorOp));
  static_assert(kTensorOp ? kBlockN % 16 == 0 && kBlockH % 8 == 0 : kBlockN == 16 || kBlockN == 32);
};

// kVecWidth elements moved as one integer.
template <class T>
using Vector = cute::uint_bit_t<T::kVecWidth * 16>;

}  // namespace gqa
