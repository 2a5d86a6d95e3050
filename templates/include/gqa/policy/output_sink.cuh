// Output: a sink per head joins the sum: one more logit in natural units, neither scaled nor
// capped, which has no value (gpt-oss). Once per output, behind every merge: splits and blocks know
// nothing of it.
#pragma once

#include <gqa/arch/number.cuh>
#include <gqa/policy/slots.cuh>
#include <gqa/stage/combine.cuh>

namespace gqa {

template <class T>
struct SinkInSum {
  template <int kWidth>
  CUTE_DEVICE static void finish(Params const& p, Work<T> const& w, Slice s, Merged<kWidth>& r) {
    constexpr float kLog2E = 1.44269504088896341f;
    float const sink = number_at(p.sinks, p.sinks_type, w.head_of(s.head)) * kLog2E;
    float2 const max_sum[1] = {make_float2(sink, 1.f)};
    float const nothing[1][kWidth] = {};
    r.add_all(max_sum, nothing);
  }
};

}  // namespace gqa
