// Named wrappers of Hopper's instructions: barriers that count bytes, stores into the shared memory
// of a cluster, dependent launches.
#pragma once

#include <cuda/std/cstdint>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/util.hpp>
#include <cute/config.hpp>

namespace gqa {

// Barriers in shared memory that count arrivals and the bytes of asynchronous copies: PTX ISA
// 9.7.13.15, mbarrier. These have one arrival per phase, that of the thread that starts the copies.
CUTE_DEVICE void barrier_init(uint64_t& barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;"
               :
               : "r"(cute::cast_smem_ptr_to_uint(&barrier))
               : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
CUTE_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}

CUTE_DEVICE void barrier_arrive_expect(uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(cute::cast_smem_ptr_to_uint(&barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of the given parity is complete. What completes it are copies into this
// block's shared memory, by other blocks too; acquiring at cluster scope would throw away the L1
// cache each time.
CUTE_DEVICE void barrier_wait(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}"
      :
      : "r"(cute::cast_smem_ptr_to_uint(&barrier)), "r"(parity)
      : "memory");
}

// Stores two floats into the shared memory of a block of the cluster and completes their 8 bytes on
// a barrier there. PTX ISA 9.7.9.12, st.async.
CUTE_DEVICE void store_async(uint32_t target, float2 value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
               :
               : "r"(target), "f"(value.x), "f"(value.y), "r"(barrier)
               : "memory");
}

}  // namespace gqa
