// Stage 6, merge: partial outputs (O, m, l) of warps, then of splits, into the output and lse.
//
// Partials combine as (m, l, O) -> M = max m, sum of 2^(m - M) l and of 2^(m - M) O: section 3.1 of
// FlashAttention (arXiv:2205.14135), Flash-Decoding's reduction. Splits meet through global memory:
// each block leaves its partial there and draws a ticket; whoever draws the last one merges. The
// order of summation is that of the splits, not of their arrival, so results repeat to the bit.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include "ptx.cuh"
#include "softmax.cuh"
#include "work.cuh"

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

template <class T, int kWidth>
CUTE_DEVICE void write_output(Params const& p, Work<T> const& w, Slice s, Merged<kWidth> const& r) {
  using Element = typename T::Element;
  constexpr int kVec = T::kVecWidth < kWidth ? T::kVecWidth : kWidth;
  bool const empty = r.sum == 0.f;  // nothing attended: the output is zero and lse minus infinity
  float const scale = !w.valid ? kNan : empty ? 0.f : reciprocal_approx(r.sum);
  cutlass::Array<float, kWidth> values;
  CUTE_UNROLL
  for (int i = 0; i < kWidth; ++i) values[i] = r.out[i] * scale;
  auto const rounded = cutlass::NumericArrayConverter<Element, float, kWidth>{}(values);
  int const head = w.first_head() + s.head;
  auto* target = static_cast<Element*>(p.out) + w.batch * p.out_stride.batch +
                 head * p.out_stride.head + s.dim;
  using Out = cute::uint_bit_t<kVec * 16>;
  CUTE_UNROLL
  for (int i = 0; i < kWidth / kVec; ++i) {
    reinterpret_cast<Out*>(target)[i] = reinterpret_cast<Out const*>(&rounded)[i];
  }
  if (p.lse != nullptr && s.dim == 0) {
    constexpr float kLn2 = 0.693147180559945309f;
    int64_t const num_q_heads = int64_t(p.num_kv_heads) * T::kGroupSize;
    float const lse = empty ? -kInfinity : (r.max + log2f(r.sum)) * kLn2;
    p.lse[w.batch * num_q_heads + head] = w.valid ? lse : kNan;
  }
}

// The partials that one merge brings together, in global memory: every O of the launch first, then
// every (m, l).
template <class T, int kWidth>
class PartialStore {
 public:
  // Those from number `first` of `count` in this launch. They cover the dims from first_dim on.
  CUTE_DEVICE PartialStore(float* partials, int64_t first, int64_t count, int first_dim = 0)
      : out_(partials + first * kOut),
        max_sum_(partials + count * kOut + first * kMaxSum),
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
  static constexpr int kOut = T::kBlockH * T::kHeadDim;
  static constexpr int kMaxSum = T::kBlockH * 2;
  using Vec = cute::conditional_t<kWidth == 4, float4, float2>;
  static_assert(sizeof(Vec) == kWidth * sizeof(float));

  CUTE_DEVICE Vec* out(int part, Slice s) const {
    return reinterpret_cast<Vec*>(out_ + part * kOut + s.head * T::kHeadDim + s.dim);
  }
  CUTE_DEVICE float2* max_sum(int part, int head) const {
    return reinterpret_cast<float2*>(max_sum_ + part * kMaxSum + head * 2);
  }

  float* out_;
  float* max_sum_;
  int first_dim_;
};

// Whether this block is the last of `count` to come here. Called by the whole block, which has
// written its partial: the ticket releases it, and acquires those of the others.
CUTE_DEVICE bool arrives_last(uint32_t* counter, int count, uint32_t& shared_answer) {
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t const last = count - 1;
    shared_answer = atomic_inc_acq_rel(counter, last) == last;
  }
  __syncthreads();
  return shared_answer;
}

// The block's partial: its warps' partials, all of them in shared memory.
template <class T, int kWidth>
CUTE_DEVICE Merged<kWidth> merge_warps(SharedStorage<T> const& shared, Slice s) {
  float2 max_sum[T::kNumWarps];
  float o[T::kNumWarps][kWidth];
  CUTE_UNROLL
  for (int i = 0; i < T::kNumWarps; ++i) {
    auto const* partial = reinterpret_cast<float const*>(shared.warp[i]);
    max_sum[i] = make_float2(shared.row_max[i][s.head], shared.row_sum[i][s.head]);
    float4 const v = *reinterpret_cast<float4 const*>(partial + s.head * T::kPartialPitch + s.dim);
    o[i][0] = v.x, o[i][1] = v.y, o[i][2] = v.z, o[i][3] = v.w;
  }
  Merged<kWidth> r;
  r.add_all(max_sum, o);
  return r;
}

// Called by the whole block after the barrier that follows the warps' stores.
template <class T>
CUTE_DEVICE void merge(Params const& p, Work<T> const& w, SharedStorage<T>& shared) {
  constexpr int kWidth = 4;
  constexpr int kPerHead = T::kHeadDim / kWidth;
  auto const for_slices = [&](auto&& visit) {
    for (int i = threadIdx.x; i < w.num_heads() * kPerHead; i += T::kNumThreads) {
      visit(Slice{i / kPerHead, i % kPerHead * kWidth});
    }
  };
  bool const alone = w.num_splits == 1;
  PartialStore<T, kWidth> const store(p.partials, w.first_partial(), w.num_partials());
  for_slices([&](Slice s) {
    Merged<kWidth> const r = merge_warps<T, kWidth>(shared, s);
    if (alone) {
      write_output(p, w, s, r);
    } else {
      store.write(w.split, s, r);
    }
  });
  if (alone || !arrives_last(p.tickets + w.head_index(), w.num_splits, shared.is_last)) return;
  for_slices([&](Slice s) { write_output(p, w, s, store.merge(w.num_splits, s)); });
}

// Leaves word of a sequence whose length the cache cannot hold. Its output is NaN. Volatile: other
// blocks may do the same, and the host reads it.
template <class T>
CUTE_DEVICE void report_overflow(Params const& p, Work<T> const& w) {
  if (!w.valid && w.split == 0 && blockIdx.x == 0 && threadIdx.x == 0) {
    *static_cast<int32_t volatile*>(p.status) = 1 + w.batch;
  }
}

}  // namespace gqa
