// Stage 6, merge: partial outputs (O, m, l) of warps, then of splits, into the output and lse.
//
// Partials combine as (m, l, O) -> M = max m, sum of 2^(m - M) l and of 2^(m - M) O: section 3.1 of
// FlashAttention (arXiv:2205.14135), Flash-Decoding's reduction. Splits meet through global memory:
// each block leaves its partial there and draws a ticket; whoever draws the last one merges. The
// order of summation is that of the splits, not of their arrival, so results repeat to the bit.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include "load.cuh"
#include "ptx.cuh"
#include "softmax.cuh"

namespace gqa {

// Four output elements of one head, the unit of work of a thread in this stage.
template <class T>
struct Slice {
  static constexpr int kWidth = 4;
  static constexpr int kPerHead = T::kHeadDim / kWidth;

  int head, dim;
  CUTE_DEVICE explicit Slice(int i) : head(i / kPerHead), dim(i % kPerHead * kWidth) {}
};

// A running merge of partials.
struct Merged {
  float max = kNoMax;
  float sum = 0.f;
  float4 out = {0.f, 0.f, 0.f, 0.f};

  CUTE_DEVICE void add(float weight, float l, float4 o) {
    sum = fmaf(weight, l, sum);
    out.x = fmaf(weight, o.x, out.x);
    out.y = fmaf(weight, o.y, out.y);
    out.z = fmaf(weight, o.z, out.z);
    out.w = fmaf(weight, o.w, out.w);
  }
};

template <class T>
CUTE_DEVICE void write_output(Params const& p, Work<T> const& w, Slice<T> s, Merged const& r) {
  using Element = typename T::Element;
  constexpr int kWidth = T::kVecWidth < Slice<T>::kWidth ? T::kVecWidth : Slice<T>::kWidth;
  bool const empty = r.sum == 0.f;  // nothing attended: the output is zero and lse minus infinity
  float const scale = empty ? 0.f : 1.f / r.sum;
  cutlass::Array<float, 4> values;
  values[0] = r.out.x * scale;
  values[1] = r.out.y * scale;
  values[2] = r.out.z * scale;
  values[3] = r.out.w * scale;
  auto const rounded = cutlass::NumericArrayConverter<Element, float, 4>{}(values);
  int const head = w.first_head() + s.head;
  auto* target = static_cast<Element*>(p.out) + w.batch * p.out_stride.batch +
                 head * p.out_stride.head + s.dim;
  using Out = cute::uint_bit_t<kWidth * 16>;
  CUTE_UNROLL
  for (int i = 0; i < Slice<T>::kWidth / kWidth; ++i) {
    reinterpret_cast<Out*>(target)[i] = reinterpret_cast<Out const*>(&rounded)[i];
  }
  if (p.lse != nullptr && s.dim == 0) {
    constexpr float kLn2 = 0.693147180559945309f;
    int64_t const num_q_heads = int64_t(p.num_kv_heads) * T::kGroupSize;
    p.lse[w.batch * num_q_heads + head] = empty ? -kInfinity : (r.max + log2f(r.sum)) * kLn2;
  }
}

// The block's partial: its warps' partials, all of them in shared memory.
template <class T>
CUTE_DEVICE Merged merge_warps(SharedStorage<T> const& shared, Slice<T> s) {
  Merged r;
  CUTE_UNROLL
  for (int i = 0; i < T::kNumWarps; ++i) r.max = fmaxf(r.max, shared.row_max[i][s.head]);
  CUTE_UNROLL
  for (int i = 0; i < T::kNumWarps; ++i) {
    auto const* partial = reinterpret_cast<float const*>(shared.warp[i]);
    r.add(exp2_approx(shared.row_max[i][s.head] - r.max), shared.row_sum[i][s.head],
          *reinterpret_cast<float4 const*>(partial + s.head * T::kPartialPitch + s.dim));
  }
  return r;
}

// The partials of all blocks in global memory: every O first, then every (m, l).
template <class T>
class PartialStore {
 public:
  CUTE_DEVICE PartialStore(Params const& p, Work<T> const& w)
      : out_(p.partials + w.partial_index(p, 0) * kOut),
        max_sum_(p.partials + int64_t(gridDim.x) * gridDim.y * gridDim.z * kOut +
                 w.partial_index(p, 0) * kMaxSum) {}

  CUTE_DEVICE void write(int split, Slice<T> s, Merged const& r) const {
    __stcg(reinterpret_cast<float4*>(out_ + split * kOut + s.head * T::kHeadDim + s.dim), r.out);
    if (s.dim == 0) __stcg(max_sum(split, s.head), make_float2(r.max, r.sum));
  }
  CUTE_DEVICE float4 read_out(int split, Slice<T> s) const {
    return __ldcg(
        reinterpret_cast<float4 const*>(out_ + split * kOut + s.head * T::kHeadDim + s.dim));
  }
  CUTE_DEVICE float2 read_max_sum(int split, Slice<T> s) const {
    return __ldcg(max_sum(split, s.head));
  }

 private:
  static constexpr int kOut = T::kBlockH * T::kHeadDim;
  static constexpr int kMaxSum = T::kBlockH * 2;

  CUTE_DEVICE float2* max_sum(int split, int head) const {
    return reinterpret_cast<float2*>(max_sum_ + split * kMaxSum + head * 2);
  }

  float* out_;
  float* max_sum_;
};

// Sums all splits' partials, kBatch loads in flight at a time.
template <class T>
CUTE_DEVICE Merged merge_splits(PartialStore<T> const& store, int num_splits, Slice<T> s) {
  constexpr int kBatch = 8;
  Merged r;
  for (int first = 0; first < num_splits; first += kBatch) {
    float2 max_sum[kBatch];
    float4 out[kBatch];
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      bool const exists = first + i < num_splits;
      max_sum[i] = exists ? store.read_max_sum(first + i, s) : make_float2(kNoMax, 0.f);
      out[i] = exists ? store.read_out(first + i, s) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    float new_max = r.max;
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) new_max = fmaxf(new_max, max_sum[i].x);
    Merged next;
    next.max = new_max;
    next.add(exp2_approx(r.max - new_max), r.sum, r.out);
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      next.add(exp2_approx(max_sum[i].x - new_max), max_sum[i].y, out[i]);
    }
    r = next;
  }
  return r;
}

// Called by the whole block after the barrier that follows the warps' stores.
template <class T>
CUTE_DEVICE void merge(Params const& p, Work<T> const& w, SharedStorage<T>& shared) {
  int const num_slices = w.num_heads() * Slice<T>::kPerHead;
  bool const alone = w.num_splits == 1;
  PartialStore<T> const store(p, w);
  for (int i = threadIdx.x; i < num_slices; i += T::kNumThreads) {
    Merged const r = merge_warps(shared, Slice<T>(i));
    if (alone) {
      write_output(p, w, Slice<T>(i), r);
    } else {
      store.write(w.split, Slice<T>(i), r);
    }
  }
  if (alone) return;

  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* counter = p.tickets + int64_t(w.batch) * gridDim.x + blockIdx.x;
    uint32_t const last = w.num_splits - 1;
    shared.is_last = atomic_inc_acq_rel(counter, last) == last;
  }
  __syncthreads();
  if (!shared.is_last) return;
  for (int i = threadIdx.x; i < num_slices; i += T::kNumThreads) {
    write_output(p, w, Slice<T>(i), merge_splits(store, w.num_splits, Slice<T>(i)));
  }
}

// A sequence whose length the cache cannot hold: its output is NaN, nothing else is written.
template <class T>
CUTE_DEVICE void reject(Params const& p, Work<T> const& w) {
  if (w.split != 0) return;
  Merged nan;
  nan.max = nan.sum = nan.out.x = nan.out.y = nan.out.z = nan.out.w = kNan;
  for (int i = threadIdx.x; i < w.num_heads() * Slice<T>::kPerHead; i += T::kNumThreads) {
    write_output(p, w, Slice<T>(i), nan);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.status = 1 + w.batch;
}

}  // namespace gqa
