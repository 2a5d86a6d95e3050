// Stage 7, output: what is merged, divided and rounded into the output, and the log-sum-exp.
#pragma once

#include <cutlass/array.h>

#include <gqa/policy/slots.cuh>
#include <gqa/stage/combine.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

template <class T>
CUTE_DEVICE int64_t place_of_lse(Params const& p, Work<T> const& w, int row) {
  if constexpr (kOneQuery<T>) {
    int64_t const num_q_heads = int64_t(p.num_kv_heads) * T::kGroupSize;
    return w.batch * num_q_heads + w.head_of(row);
  } else {
    return w.batch * p.lse_batch_stride + w.head_of(row) * p.lse_head_stride + w.queries.first +
           w.token_of(row);
  }
}

template <class T, int kWidth>
CUTE_DEVICE void write_output(Params const& p, Work<T> const& w, Slice s, Merged<kWidth>&& r) {
  OutputOf<T>::finish(p, w, s, r);
  OperandsOf<T>::scale_values(p, w, r);
  bool const empty = r.sum == 0.f;  // nothing attended: the output is zero and lse minus infinity
  float const scale = !w.valid ? kNan : empty ? 0.f : reciprocal_approx(r.sum);
  cutlass::Array<float, kWidth> values;
  CUTE_UNROLL
  for (int i = 0; i < kWidth; ++i) values[i] = r.out[i] * scale;
  auto const rounded = ResultOf<T>::rounded(values);
  using Stored = typename decltype(rounded)::Element;
  auto* target =
      static_cast<Stored*>(p.out) + w.place_of(s.head, p.out_stride, p.out_token_stride) + s.dim;
  // Addresses are aligned to kVecWidth times 16 bits, and to what is stored.
  constexpr int kAligned = cute::max(T::kVecWidth * 2 / int(sizeof(Stored)), 1);
  constexpr int kVec = cute::min(kAligned, kWidth);
  constexpr int kBytes = kVec * int(sizeof(Stored));
  using Out = cute::uint_bit_t<kBytes * 8>;
  CUTE_UNROLL
  for (int i = 0; i < kWidth / kVec; ++i) {
    reinterpret_cast<Out*>(target)[i] = reinterpret_cast<Out const*>(&rounded)[i];
  }
  if (p.lse != nullptr && s.dim == 0) {
    constexpr float kLn2 = 0.693147180559945309f;
    float const lse = empty ? -kInfinity : (r.max + log2f(r.sum)) * kLn2;
    p.lse[place_of_lse(p, w, s.head)] = w.valid ? lse : kNan;
  }
}

// Leaves word of a sequence whose output is NaN. Volatile: other blocks may do the same, and the
// host reads it.
template <class T>
CUTE_DEVICE void report(Params const& p, Work<T> const& w) {
  *static_cast<int32_t volatile*>(p.overflow_flag) = 1 + w.batch;
}

// The same of one whose length the cache cannot hold.
template <class T>
CUTE_DEVICE void report_overflow(Params const& p, Work<T> const& w) {
  if (!w.valid && w.split == 0 && blockIdx.x == 0 && threadIdx.x == 0) report(p, w);
}

}  // namespace gqa
