// Named wrappers of the instructions that neither CUDA C++ nor CuTe offers.
#pragma once

#include <cuda/std/cstdint>
#include <cute/arch/util.hpp>
#include <cute/config.hpp>

namespace gqa {

// 2^x, flushing denormals to zero; 2^-inf is +0. PTX ISA 9.7.3.22, ex2.
CUTE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to the last bit or the one beside it. PTX ISA 9.7.3.13, rcp.
CUTE_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Keeps a load where it stands, for the compiler would move it behind branches to its first use.
CUTE_DEVICE void keep_here(uint32_t& loaded) { asm volatile("" : "+r"(loaded)); }

// The larger of two pairs of bfloat16, NaN where there is one. PTX ISA 9.7.4.8, max.
CUTE_DEVICE uint32_t max_of_bfloat16(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// L2 policy for data that is read once: first to go when room is needed. PTX ISA 9.7.9.18.
CUTE_DEVICE uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Starts copying one vector (4, 8 or 16 bytes) to shared memory; zeros where it does not exist.
// Goes through L1 (.ca): it asks L2 for whole lines where .cg asks for pieces, which costs 6 to 13%
// of the bandwidth on an H200. Where several rows share a line of 128 bytes, L2 fetches all of it,
// for whoever reads the others at about the same time: a fifth less time with rows of 64 bytes.
// Where rows are of other sizes that costs up to 12%. PTX ISA 9.7.9.25.3.1, cp.async.
template <bool kFetchesLine, class Vec>
CUTE_DEVICE void copy_async(Vec const* source, Vec* target, bool exists, uint64_t policy) {
  uint32_t const place = cute::cast_smem_ptr_to_uint(target);
  int const num_bytes = exists ? int(sizeof(Vec)) : 0;
  if constexpr (kFetchesLine) {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint.L2::128B [%0], [%1], %2, %3, %4;"
                 :
                 : "r"(place), "l"(source), "n"(sizeof(Vec)), "r"(num_bytes), "l"(policy)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint.L2::64B [%0], [%1], %2, %3, %4;"
                 :
                 : "r"(place), "l"(source), "n"(sizeof(Vec)), "r"(num_bytes), "l"(policy)
                 : "memory");
  }
}

// Adds one to a counter and returns what it was; at `last` it goes back to zero instead. Release:
// what this block wrote is visible to whoever counts after it. Acquire: the reverse. PTX
// ISA 9.7.13.5, atom.
CUTE_DEVICE uint32_t atomic_inc_acq_rel(uint32_t* counter, uint32_t last) {
  uint32_t count;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(count)
               : "l"(counter), "r"(last)
               : "memory");
  return count;
}

// Programmatic dependent launch: a kernel may start while the one before it in the stream finishes.
// Waits until that one is done and what it wrote can be read. PTX ISA 9.7.13.13, griddepcontrol.
CUTE_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// Lets the next kernel start, if it is launched so, once all blocks have come here or ended.
CUTE_DEVICE void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// Starts bringing bytes to L2, a multiple of 16 at an address that is one. Whoever writes them
// later is not disturbed: all writes go through L2. PTX ISA 9.7.9.25.5.3, cp.async.bulk.prefetch.
CUTE_DEVICE void prefetch_to_l2(void const* source, int num_bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
               :
               : "l"(source), "r"(num_bytes)
               : "memory");
#endif
}

}  // namespace gqa
