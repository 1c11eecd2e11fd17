// SPDX-License-Identifier: Apache-2.0
//
// "Asynchronous Warpgroup Level Matrix Instructions": d (64 x kN, fp32) += a (64 x 16) * b (16 x kN), issued by a
// warpgroup. The accumulator of a lane is that of kN / 8 fragments m16n8 (see ampere/tile.cuh), warp w holding rows
// 16 w ..; a from registers is laid out as for mma.m16n8k16. Nothing that a product reads or writes may be touched
// between its issue and the wait for its group.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flash_models::ptx {

// Before the first product after registers were written: "wgmma.fence".
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Operand lists: accumulators i .. i + 15, and the names by which the instruction refers to them.
#define FM_D4(f) "+f"(d[0][f][0]), "+f"(d[0][f][1]), "+f"(d[0][f][2]), "+f"(d[0][f][3])
#define FM_D16(f) FM_D4(f), FM_D4(f + 1), FM_D4(f + 2), FM_D4(f + 3)
#define FM_D32 FM_D16(0), FM_D16(4)
#define FM_D48 FM_D32, FM_D16(8)
#define FM_D64 FM_D48, FM_D16(12)
#define FM_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define FM_NAMES_32 FM_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FM_NAMES_48 FM_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define FM_NAMES_64 FM_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// One width and type. NAMES, D: the lists above; o0 ..: the numbers of the operands that follow them.
#define FM_WGMMA(WIDTH, FRAGMENTS, T, TYPE, NAMES, D, o0, o1, o2, o3, o4, o5, o6)                                     \
  template <bool kBTransposed>                                                                                        \
  __device__ __forceinline__ void wgmma_of(T, float (&d)[1][FRAGMENTS][4], const uint32_t (&a)[4], uint64_t b,        \
                                           bool accumulate) {                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" o5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" WIDTH              \
                 "k16.f32." TYPE "." TYPE " {" NAMES "}, {%" o0 ",%" o1 ",%" o2 ",%" o3 "}, %" o4 ", p, 1, 1, %" o6   \
                 ";\n}"                                                                                               \
                 : D                                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),             \
                   "n"(static_cast<int>(kBTransposed))                                                                \
                 : "memory");                                                                                         \
  }                                                                                                                   \
  template <bool kATransposed, bool kBTransposed>                                                                     \
  __device__ __forceinline__ void wgmma_of(T, float (&d)[1][FRAGMENTS][4], uint64_t a, uint64_t b, bool accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" o2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" WIDTH              \
                 "k16.f32." TYPE "." TYPE " {" NAMES "}, %" o0 ", %" o1 ", p, 1, 1, %" o3 ", %" o4 ";\n}"             \
                 : D                                                                                                  \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kATransposed)),            \
                   "n"(static_cast<int>(kBTransposed))                                                                \
                 : "memory");                                                                                         \
  }
#define FM_WGMMA_TYPES(WIDTH, FRAGMENTS, NAMES, D, ...)                              \
  FM_WGMMA(WIDTH, FRAGMENTS, __nv_bfloat16, "bf16", NAMES, FM_UNWRAP D, __VA_ARGS__) \
  FM_WGMMA(WIDTH, FRAGMENTS, __half, "f16", NAMES, FM_UNWRAP D, __VA_ARGS__)
#define FM_UNWRAP(...) __VA_ARGS__

FM_WGMMA_TYPES("32", 4, FM_NAMES_16, (FM_D16(0)), "16", "17", "18", "19", "20", "21", "22")
FM_WGMMA_TYPES("64", 8, FM_NAMES_32, (FM_D32), "32", "33", "34", "35", "36", "37", "38")
FM_WGMMA_TYPES("96", 12, FM_NAMES_48, (FM_D48), "48", "49", "50", "51", "52", "53", "54")
FM_WGMMA_TYPES("128", 16, FM_NAMES_64, (FM_D64), "64", "65", "66", "67", "68", "69", "70")

// kBTransposed: b lies in shared memory as 16 rows of kN elements, otherwise as kN rows of 16. `accumulate` false
// overwrites d.
template <typename T, bool kBTransposed, int kFragments>
__device__ __forceinline__ void wgmma(float (&d)[1][kFragments][4], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  wgmma_of<kBTransposed>(T{}, d, a, b, accumulate);
}

// The same with a in shared memory; kATransposed: as 16 rows of 64 elements, otherwise as 64 rows of 16.
template <typename T, bool kATransposed, bool kBTransposed, int kFragments>
__device__ __forceinline__ void wgmma(float (&d)[1][kFragments][4], uint64_t a, uint64_t b, bool accumulate) {
  wgmma_of<kATransposed, kBTransposed>(T{}, d, a, b, accumulate);
}

#undef FM_D4
#undef FM_D16
#undef FM_D32
#undef FM_D48
#undef FM_D64
#undef FM_NAMES_16
#undef FM_NAMES_32
#undef FM_NAMES_48
#undef FM_NAMES_64
#undef FM_WGMMA
#undef FM_WGMMA_TYPES
#undef FM_UNWRAP

}  // namespace flash_models::ptx
