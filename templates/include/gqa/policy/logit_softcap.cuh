// Logit: cap * tanh(softmax_scale * dot / cap), which stays between -cap and cap (Gemma 2).
//
// tanhf is right to 2 ulp everywhere. tanh.approx.f32 is one instruction instead of 17, but off by
// 2^-11: 0.02 in a score near a cap of 50, which the log-sum-exp shows.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct SoftCapped {
  float in, out;

  CUTE_DEVICE explicit SoftCapped(Params const& p) : in(p.softcap_in), out(p.softcap_out) {}
  CUTE_DEVICE float operator()(float dot, int, Position) const { return out * tanhf(dot * in); }
};

}  // namespace gqa
