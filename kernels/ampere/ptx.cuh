// SPDX-License-Identifier: Apache-2.0
//
// One instruction per function, named after the PTX ISA section it wraps. sm_80 and later. Knows nothing of attention.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flash_models::ptx {

// An instruction without operands that earlier GPUs do without.
#if __CUDA_ARCH__ >= 900
#define FM_FROM_SM90(instruction) asm volatile(instruction::: "memory")
#else
#define FM_FROM_SM90(instruction)
#endif

// Address of the dynamic shared memory of this launch, in the shared state space.
__device__ __forceinline__ uint32_t dynamic_shared() {
  extern __shared__ __align__(128) uint8_t shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// "Parallel Synchronization: griddepcontrol". For a kernel that was launched early, by all of its CTAs: returns once
// the kernel before it has ended and what it wrote can be read. A CTA that left without it would let the kernel after
// this one begin while the one before is at work.
__device__ __forceinline__ void await_previous_kernel() { FM_FROM_SM90("griddepcontrol.wait;"); }

// The same, for the kernel before: the next one may begin where there is room, once all CTAs have said so.
__device__ __forceinline__ void let_next_kernel_begin() { FM_FROM_SM90("griddepcontrol.launch_dependents;"); }

// This thread's lane, read once: from a plain threadIdx.x the compiler reads the special register again at every use,
// which waits behind all that is under way to memory.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// "Parallel Synchronization: barrier.cluster". By all threads of a cluster that have not ended. Who has waited may read
// what the others wrote to its shared memory before they arrived. Blocks in clusters need compute capability 9.0.
__device__ __forceinline__ void cluster_arrive() { FM_FROM_SM90("barrier.cluster.arrive.aligned;"); }
// The same where nothing has been written, at the start: the others wait until this block's shared memory is there.
__device__ __forceinline__ void cluster_arrive_relaxed() { FM_FROM_SM90("barrier.cluster.arrive.relaxed.aligned;"); }
__device__ __forceinline__ void cluster_wait() { FM_FROM_SM90("barrier.cluster.wait.aligned;"); }

// "Data Movement: mapa, st". Writes to this address of the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void store_to_cluster(uint32_t shared, int rank, float x) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .u32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.f32 [there], %2;\n"
      "}" ::"r"(shared),
      "r"(rank), "f"(x)
      : "memory");
#endif
}

// "Data Movement: cp.async". Copies 16 bytes global -> shared, or writes 16 zero bytes when !valid (src-size 0).
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// "Data Movement: ld". 16 bytes that this CTA reads once. Other such instructions stay where they are around it, so
// what is loaded early stays early.
__device__ __forceinline__ uint4 load_once_16(const void* global) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(global));
  return x;
}

// "Warp-level Matrix Load Instruction: ldmatrix". Four 8x8 matrices of 16-bit elements; lanes 8i..8i+7 address matrix
// i.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// "Warp-level Matrix Transpose Instruction: movmatrix". One 8x8 matrix of 16-bit elements spread over the warp.
__device__ __forceinline__ uint32_t movmatrix_transposed(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// "Integer Arithmetic Instructions: mul.wide". From a plain product of 64 bits the compiler makes one that also adds
// the halves that are 0.
__device__ __forceinline__ uint64_t multiply_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

// "Data Movement: prmt". Each byte of the result repeats the sign bit of the byte of x that the nibble of kSelector,
// less 8, numbers.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t byte_signs(uint32_t x) {
  static_assert((kSelector & 0x8888) == 0x8888);
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "n"(kSelector));
  return y;
}

// "Matrix Fragments for mma.m16n8k16 with floating point type". d (16x8, fp32) += a (16x16) * b (16x8).
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// "ex2.approx.ftz.f32": 2^x, +0 for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Adds one accumulator fragment (4 floats per lane) to 512 bytes of global memory that belong to this fragment alone.
// "Parallel Synchronization: red", the vector form needs sm_90. Which lane owns which float is private to the two
// functions below; both orders are coalesced.
__device__ __forceinline__ void red_add_fragment(float* fragment, int lane, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(fragment + 4 * lane), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) atomicAdd(fragment + 32 * i + lane, x[i]);
#endif
}

__device__ __forceinline__ void load_fragment(const float* fragment, int lane, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if __CUDA_ARCH__ >= 900
    x[i] = fragment[4 * lane + i];
#else
    x[i] = fragment[32 * i + lane];
#endif
  }
}

#undef FM_FROM_SM90

}  // namespace flash_models::ptx
