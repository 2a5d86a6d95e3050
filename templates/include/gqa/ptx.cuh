// Named wrappers of the instructions that neither CUDA C++ nor CuTe offers.
#pragma once

#include <cuda/std/cstdint>
#include <cute/config.hpp>

namespace gqa {

// 2^x, flushing denormals to zero; 2^-inf is +0. PTX ISA 9.7.3.22, ex2.
CUTE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Takes a ticket and returns its number; the ticket numbered `last` sets the counter back to zero.
// Release: what this block wrote is visible to whoever draws a later ticket. Acquire: the reverse.
// PTX ISA 9.7.13.5, atom.
CUTE_DEVICE uint32_t atomic_inc_acq_rel(uint32_t* counter, uint32_t last) {
  uint32_t ticket;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(ticket)
               : "l"(counter), "r"(last)
               : "memory");
  return ticket;
}

}  // namespace gqa
