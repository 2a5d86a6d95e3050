// Stage 6, combine: partial outputs (O, m, l) of warps, of blocks or of splits into one.
//
// Partials combine as (m, l, O) -> M = max m, sum of 2^(m - M) l and of 2^(m - M) O: section 3.1 of
// FlashAttention (arXiv:2205.14135), Flash-Decoding's reduction. Splits meet through global memory:
// each block leaves its partial there and adds one to the merge's counter; the last to come merges.
// The order of summation is that of the splits, not of their arrival, so results repeat to the bit.
#pragma once

#include <gqa/arch/ptx.cuh>
#include <gqa/traits.cuh>

namespace gqa {

// Some neighbouring output elements of one head, the unit of work of a thread in this stage.
struct Slice {
  int head, dim;
};

// A running merge of partials, for a slice of kWidth elements.
template <int kWidth>
struct Merged {
  float max = kNoMax;
  float sum = 0.f;
  float out[kWidth] = {};

  CUTE_DEVICE void add(float weight, float l, float const (&o)[kWidth]) {
    sum = fmaf(weight, l, sum);
    CUTE_UNROLL
    for (int i = 0; i < kWidth; ++i) out[i] = fmaf(weight, o[i], out[i]);
  }

  // Adds kCount partials at once. Those that do not exist have the maximum kNoMax, and zeros.
  template <int kCount>
  CUTE_DEVICE void add_all(float2 const (&max_sum)[kCount], float const (&o)[kCount][kWidth]) {
    Merged next;
    next.max = max;
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) next.max = fmaxf(next.max, max_sum[i].x);
    next.add(exp2_approx(max - next.max), sum, out);
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      next.add(exp2_approx(max_sum[i].x - next.max), max_sum[i].y, o[i]);
    }
    *this = next;
  }
};

// The partials that one merge brings together, in global memory: every O of the launch first, then
// every (m, l).
template <class T, int kWidth>
class PartialStore {
 public:
  // Those from number `first` of `count` in this launch. They cover the dims from first_dim on.
  CUTE_DEVICE PartialStore(float* split_workspace, int64_t first, int64_t count, int first_dim = 0)
      : o_partial_(split_workspace + first * kOut),
        max_sum_(split_workspace + count * kOut + first * kMaxSum),
        first_dim_(first_dim) {}

  CUTE_DEVICE void write(int part, Slice s, Merged<kWidth> const& r) const {
    __stcg(out(part, s), reinterpret_cast<Vec const&>(r.out));
    if (s.dim == first_dim_) __stcg(max_sum(part, s.head), make_float2(r.max, r.sum));
  }

  // Sums num_parts partials, kBatch loads in flight at a time.
  CUTE_DEVICE Merged<kWidth> merge(int num_parts, Slice s) const {
    constexpr int kBatch = 8;
    Merged<kWidth> r;
    CUTE_NO_UNROLL
    for (int first = 0; first < num_parts; first += kBatch) {
      float2 ml[kBatch];
      alignas(16) float o[kBatch][kWidth] = {};
      CUTE_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        bool const exists = first + i < num_parts;
        ml[i] = exists ? __ldcg(max_sum(first + i, s.head)) : make_float2(kNoMax, 0.f);
        if (exists) reinterpret_cast<Vec&>(o[i]) = __ldcg(out(first + i, s));
      }
      r.add_all(ml, o);
    }
    return r;
  }

 private:
  static constexpr int kOut = T::kBlockH * T::kHeadDimV;
  static constexpr int kMaxSum = T::kBlockH * 2;
  using Vec = cute::conditional_t<kWidth == 4, float4, float2>;
  static_assert(sizeof(Vec) == kWidth * sizeof(float));

  CUTE_DEVICE Vec* out(int part, Slice s) const {
    return reinterpret_cast<Vec*>(o_partial_ + part * kOut + s.head * T::kHeadDimV + s.dim);
  }
  CUTE_DEVICE float2* max_sum(int part, int head) const {
    return reinterpret_cast<float2*>(max_sum_ + part * kMaxSum + head * 2);
  }

  float* o_partial_;
  float* max_sum_;
  int first_dim_;
};

// Whether this block is the last of `count` to come here. Called by the whole block, which has
// written its partial: counting releases it, and acquires those of the others.
CUTE_DEVICE bool arrives_last(uint32_t* counter, int count, uint32_t& shared_answer) {
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t const last = count - 1;
    shared_answer = atomic_inc_acq_rel(counter, last) == last;
  }
  __syncthreads();
  return shared_answer;
}

}  // namespace gqa
