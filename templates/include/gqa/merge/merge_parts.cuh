// Attention over parts of the keys, made one. Of outputs o_i with log-sum-exps l_i:
//   l = log(sum of exp(l_i)), o = sum of exp(l_i - l) o_i
// (Rabe and Staats, arXiv:2112.05682, section 2; the largest l_i is taken out of the sums).
//
// A thread has one or two vectors of kVecWidth elements, of one head and token: of two, its share
// of either half of the row, so that neighbours read what lies together. What does not depend on
// the elements is done once for both. The first parts are asked for together with their
// log-sum-exps, which all threads of a row read.
#pragma once

#include <cuda/std/limits>
#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include <gqa/arch/ptx.cuh>
#include <gqa/merge/merge_params.cuh>

namespace gqa {

// The log-sum-exp of a part without keys, and of one that is not there.
constexpr float kEmptyPart = -cuda::std::numeric_limits<float>::infinity();

// As many bytes, as one access moves them.
template <int kBytes>
using Access = cute::conditional_t<
    kBytes == 16, uint4,
    cute::conditional_t<kBytes == 8, uint2,
                        cute::conditional_t<kBytes == 4, unsigned int, unsigned short>>>;

// A quotient by a number that the host knows, without a division: for dividends below 2^31.
CUTE_DEVICE uint32_t quotient(uint32_t dividend, Divisor const& by) {
  return uint64_t(dividend) * by.multiplier >> by.shift;
}

// Which vectors of a row a thread has: one, and one so many behind it, or twice the same.
struct Share {
  uint32_t first, distance;
};

// What a thread reads: its vectors of some parts that follow each other.
template <class V>
struct Batch {
  using Vector = Access<V::kVecWidth* int(sizeof(typename V::Element))>;

  float lse[V::kParts];
  Vector out[V::kParts][V::kVectors];
};

// One head and token of all parts.
template <class V>
class Parts {
 public:
  CUTE_DEVICE Parts(MergeParams const& p, int64_t out_offset, int64_t lse_offset, Share share)
      : p_(p),
        out_offset_(out_offset + share.first * V::kVecWidth),
        lse_offset_(lse_offset),
        share_(share) {}

  CUTE_DEVICE float lse(int part) const {
    if (part >= p_.num_parts) return kEmptyPart;
    return p_.lses[part % kListed][part / kListed * p_.lses_step + lse_offset_];
  }

  CUTE_DEVICE Batch<V> load(int first) const {
    Batch<V> batch;
    CUTE_UNROLL
    for (int i = 0; i < V::kParts; ++i) {
      batch.lse[i] = lse(first + i);
      auto const* source = out(first + i);
      CUTE_UNROLL
      for (int j = 0; j < V::kVectors; ++j) {
        if (first + i < p_.num_parts) batch.out[i][j] = __ldcg(source + j * share_.distance);
      }
    }
    return batch;
  }

 private:
  static constexpr int kListed = sizeof(MergeParams::outs) / sizeof(MergeParams::outs[0]);

  CUTE_DEVICE auto out(int part) const {
    auto const* source = static_cast<typename V::Element const*>(p_.outs[part % kListed]) +
                         part / kListed * p_.outs_step + out_offset_;
    return reinterpret_cast<typename Batch<V>::Vector const*>(source);
  }

  MergeParams const& p_;
  int64_t out_offset_, lse_offset_;
  Share share_;
};

// The sum of exp(l_i), as exp(base) times a sum.
struct ExpSum {
  float base = 0.f;  // the largest l_i; 0 where that is infinite, so that differences from it are
  float max = kEmptyPart;
  float sum = 0.f;

  CUTE_DEVICE float weight(float lse) const {
    constexpr float kLog2e = 1.44269504088896341f;
    return exp2_approx((lse - base) * kLog2e);
  }

  template <int kCount>
  CUTE_DEVICE void add(float const (&lse)[kCount]) {
    float const old_base = base;
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) max = fmaxf(max, lse[i]);
    base = fabsf(max) == -kEmptyPart ? 0.f : max;
    sum = sum == 0.f ? 0.f : sum * weight(old_base);
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) sum += weight(lse[i]);
  }

  CUTE_DEVICE float log() const {
    constexpr float kLn2 = 0.693147180559945309f;
    return base + log2f(sum) * kLn2;
  }
};

// The merged vectors of one thread.
template <class V>
struct MergedVectors {
  cutlass::Array<float, V::kVecWidth> values[V::kVectors] = {};

  // What empty parts hold does not count, whatever it is.
  CUTE_DEVICE void add(Batch<V> const& batch, ExpSum const& all, float scale) {
    using Elements = cutlass::Array<typename V::Element, V::kVecWidth>;
    cutlass::NumericArrayConverter<float, typename V::Element, V::kVecWidth> const widen;
    CUTE_UNROLL
    for (int i = 0; i < V::kParts; ++i) {
      if (batch.lse[i] == kEmptyPart) continue;
      float const share = all.weight(batch.lse[i]) * scale;
      CUTE_UNROLL
      for (int j = 0; j < V::kVectors; ++j) {
        auto const out = widen(reinterpret_cast<Elements const&>(batch.out[i][j]));
        CUTE_UNROLL
        for (int k = 0; k < V::kVecWidth; ++k) values[j][k] = fmaf(share, out[k], values[j][k]);
      }
    }
  }

  // `out` is the row's first element.
  CUTE_DEVICE void write(typename V::Result* out, Share share) const {
    CUTE_UNROLL
    for (int j = 0; j < V::kVectors; ++j) {
      auto const rounded =
          cutlass::NumericArrayConverter<typename V::Result, float, V::kVecWidth>{}(values[j]);
      constexpr int kBytes = cute::min(16, int(sizeof(rounded)));
      constexpr int kCount = int(sizeof(rounded)) / kBytes;  // two of 8 elements in float32
      auto* target = reinterpret_cast<Access<kBytes>*>(out + (share.first + j * share.distance) *
                                                                 V::kVecWidth);
      CUTE_UNROLL
      for (int i = 0; i < kCount; ++i) {
        target[i] = reinterpret_cast<Access<kBytes> const*>(&rounded)[i];
      }
    }
  }
};

template <class V>
CUTE_DEVICE void merge_parts(MergeParams const& p) {
  uint32_t const index = blockIdx.x * V::kNumThreads + threadIdx.x;
  if (index >= p.num_threads) return;
  uint32_t const row = quotient(index, p.row_threads);
  uint32_t const first = index - row * p.row_threads.number;
  uint32_t const rest = quotient(row, p.num_heads), head = row - rest * p.num_heads.number;
  uint32_t const batch = quotient(rest, p.num_tokens), token = rest - batch * p.num_tokens.number;
  bool const has_two = V::kVectors > 1 && first + p.row_threads.number < p.row_vectors;
  Share const share{first, has_two ? p.row_threads.number : 0};
  Parts<V> const parts(p, batch * p.out_batch + token * p.out_token + head * p.out_head,
                       batch * p.lse_batch + token * p.lse_token + head * p.lse_head, share);

  constexpr int kBatch = V::kParts;
  Batch<V> const read = parts.load(0);
  ExpSum all;
  all.add(read.lse);
  CUTE_NO_UNROLL
  for (int part = kBatch; part < p.num_parts; part += kBatch) {
    float lse[kBatch];
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) lse[i] = parts.lse(part + i);
    all.add(lse);
  }
  if (first == 0) {
    p.lse[(int64_t(batch) * p.num_heads.number + head) * p.num_tokens.number + token] = all.log();
  }
  float const scale = all.sum == 0.f ? 0.f : reciprocal_approx(all.sum);

  MergedVectors<V> merged;
  merged.add(read, all, scale);
  CUTE_NO_UNROLL
  for (int part = kBatch; part < p.num_parts; part += kBatch) {
    merged.add(parts.load(part), all, scale);
  }
  int64_t const written = int64_t(row) * p.row_vectors * V::kVecWidth;
  merged.write(static_cast<typename V::Result*>(p.out) + written, share);
}

}  // namespace gqa
