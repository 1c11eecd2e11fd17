// SPDX-License-Identifier: Apache-2.0
//
// Where pieces of a cut line leave their results (ListedWork, blocks.cuh) until they are combined. A slot holds the
// accumulators of a block of rows, fp32, in the order in which they lie in the lanes of the warps that own 16 rows
// each:
//
//   forward    [warp][16 x kDim of out, normalised | lse of the 16 rows]
//   backward   [warp][16 x kDim of dk | 16 x kDim of dv], without their factors
#pragma once

#include "blocks.cuh"

namespace flash_models {

__host__ __device__ constexpr int partial_out_floats(int dim) { return 16 * (dim + 1); }  // of a warp
__host__ __device__ constexpr int partial_dkv_floats(int dim) { return 2 * 16 * dim; }

// Floats of all slots.
inline int64_t partial_floats(const AttentionProblem& p, const BlockLists& lists, const WorkItems& work, int of_warp) {
  return ListedWork::count(p, lists, work.max_slots) * (p.block_size / 16) * of_warp;
}

__device__ __forceinline__ float* partial_of_warp(const AttentionProblem& p, int64_t slot, int row0, int of_warp) {
  return p.partial + (slot * (static_cast<int>(p.block_size) / 16) + row0 / 16) * of_warp;
}

template <int kN>
__device__ __forceinline__ void store_partial(const float (&acc)[1][kN][4], const float (&factor)[2], float* target,
                                              int lane) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
    reinterpret_cast<float4*>(target)[32 * n + lane] = {acc[0][n][0] * factor[0], acc[0][n][1] * factor[0],
                                                        acc[0][n][2] * factor[1], acc[0][n][3] * factor[1]};
}

}  // namespace flash_models
