// SPDX-License-Identifier: Apache-2.0
//
// Hopper's own instructions but for the products (wgmma.cuh), one per function, named after the PTX ISA section they
// wrap. sm_90a. Knows nothing of attention.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace flash_models::ptx {

// Address of the dynamic shared memory of this launch, in the shared state space; aligned as 128-byte swizzled tiles
// need it.
__device__ __forceinline__ uint32_t swizzled_shared() {
  extern __shared__ __align__(1024) uint8_t swizzled_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(swizzled_memory));
}

// "Parallel Synchronization: mbarrier". A phase ends when `count` threads have arrived and all expected bytes have.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes the inits visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// "elect.sync": `instruction` by one lane of the warp, always the same. In the branch of that lane alone, ptxas would
// put a loop around every instruction that takes uniform registers.
#define FM_ELECTED(instruction) "{\n.reg .pred leader;\nelect.sync _|leader, 0xffffffff;\n@leader " instruction "\n}"

// Whether this is that lane.
__device__ __forceinline__ bool elect_one() {
  int leader;
  asm volatile(
      "{\n"
      ".reg .pred leader;\n"
      "elect.sync _|leader, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, leader;\n"
      "}"
      : "=r"(leader));
  return leader != 0;
}

// A warp's arrivals at a barrier: one, once all its lanes are here. compute-sanitizer's racecheck orders only the lanes
// that arrive themselves, so for it (`make sanitize`) all do.
#ifdef FM_EVERY_LANE_ARRIVES
constexpr int kWarpArrivals = 32;
__device__ __forceinline__ void mbarrier_arrive_warp(uint32_t barrier) { mbarrier_arrive(barrier); }
#else
constexpr int kWarpArrivals = 1;
__device__ __forceinline__ void mbarrier_arrive_warp(uint32_t barrier) {
  __syncwarp();
  asm volatile(FM_ELECTED("mbarrier.arrive.shared::cta.b64 _, [%0];")::"r"(barrier) : "memory");
}
#endif

// By a warp; one of its lanes arrives and announces bytes.
__device__ __forceinline__ void mbarrier_arrive_expect_warp(uint32_t barrier, int bytes) {
  asm volatile(FM_ELECTED("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;")::"r"(barrier), "r"(bytes)
               : "memory");
}

// Returns once the phase of this parity has ended.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Whether that phase has ended, now: the answer takes as long as an mbarrier_wait that need not wait, but only who uses
// it does wait for it.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  int done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.b32 %0, 1, 0, done;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// "Warp-level Matrix Store Instruction: stmatrix". Four 8x8 matrices of 16-bit elements; lanes 8i..8i+7 address matrix
// i.
__device__ __forceinline__ void stmatrix(uint32_t shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// "Data Movement: cp.async.bulk.tensor". Copies the map's box at (dim, seq, head, batch) to shared memory; elements
// outside the tensor arrive as zeros and count as bytes. Called by a warp; one of its lanes issues.
__device__ __forceinline__ void tma_load_warp(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int dim,
                                              int seq, int head, int batch) {
  asm volatile(
      FM_ELECTED(
          "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3,%4,%5}], "
          "[%6];")::"r"(shared),
      "l"(&map), "r"(dim), "r"(seq), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// The same from shared memory, as one group of its issuer; elements outside the tensor are not written. Called by a
// warp; one of its lanes issues.
__device__ __forceinline__ void tma_store_warp(const CUtensorMap& map, uint32_t shared, int dim, int seq, int head,
                                               int batch) {
  asm volatile(FM_ELECTED("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2,%3,%4,%5}], [%1];\n"
                          "@leader cp.async.bulk.commit_group;")::"l"(&map),
               "r"(shared), "r"(dim), "r"(seq), "r"(head), "r"(batch)
               : "memory");
}

// "cp.async.bulk": copies `bytes`, a multiple of 16 as the addresses are. Called by a warp; one of its lanes issues.
__device__ __forceinline__ void bulk_load_warp(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  asm volatile(
      FM_ELECTED("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];")::"r"(
          shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// "Data Movement: createpolicy". How L2 is to treat lines: as it does all, or to keep them longest or shortest. The
// words that createpolicy.fractional.L2::evict_* makes for all of them.
constexpr uint64_t kCachedAsAll = 0x1000000000000000, kCachedLongest = 0x14F0000000000000,
                   kCachedShortest = 0x12F0000000000000;

// "cp.reduce.async.bulk": adds `bytes` of shared memory, floats, to global memory, as one group of its issuer. Called
// by a warp; one of its lanes issues.
__device__ __forceinline__ void bulk_add_warp(float* global, uint32_t shared, int bytes, uint64_t cache_policy) {
  asm volatile(
      FM_ELECTED("cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%0], [%1], %2, %3;\n"
                 "@leader cp.async.bulk.commit_group;")::"l"(global),
      "r"(shared), "r"(bytes), "l"(cache_policy)
      : "memory");
}

// "Data Movement: ld". Nobody reads these 16 bytes again, so L2 may use their place.
__device__ __forceinline__ float4 load_last_16(const void* global) {
  float4 x;
  asm volatile("ld.global.L2::cache_hint.v4.f32 {%0,%1,%2,%3}, [%4], %5;"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(global), "l"(kCachedShortest));
  return x;
}

// Waits until the groups that this warp issued have read their shared memory.
__device__ __forceinline__ void bulk_wait_read_warp() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  __syncwarp();
}

// "membar / fence": orders this thread's ordinary writes to shared memory before what the copy engine and wgmma read.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// "Parallel Synchronization: bar". Barriers 1 .. 15; 0 is __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// "Miscellaneous: setmaxnreg". By every warp of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#undef FM_ELECTED

}  // namespace flash_models::ptx
