// SPDX-License-Identifier: Apache-2.0
//
// Where pieces of a cut line leave their results (ListedWork, blocks.cuh) until they are combined. A slot holds the
// accumulators of a block of rows, fp32, in the order in which they lie in the lanes of the warps that own 16 rows
// each:
//
//   forward    [warp][16 x kDim of out, normalised | lse of the 16 rows]
//   backward   [warp][16 x kDim of dk | 16 x kDim of dv], without their factors
//
// The pieces of a line follow each other in the list of items and in the slots. Whoever is the last to leave something
// combines what all left, in their order, so that a result does not depend on who that is. It does so 32 columns at a
// time: it is rare, and most registers hold what goes on afterwards.
#pragma once

#include "ampere/tile.cuh"
#include "blocks.cuh"
#include "numbers.h"

namespace flash_models {

__host__ __device__ constexpr int partial_out_floats(int dim) { return 16 * (dim + 1); }  // of a warp
__host__ __device__ constexpr int partial_dkv_floats(int dim) { return 2 * 16 * dim; }

// Warps that leave something, of all slots.
inline int64_t partial_warps(const AttentionProblem& p, const BlockLists& lists, const WorkItems& work) {
  return ListedWork::count(p, lists, work.max_slots) * (p.block_size / 16);
}

template <typename Number>
__device__ __forceinline__ Number warp_of_slot(const AttentionProblem& p, Number slot, int row0) {
  return slot * (static_cast<int>(p.block_size) / 16) + row0 / 16;
}

__device__ __forceinline__ float* partial_of_warp(const AttentionProblem& p, int64_t slot, int row0, int of_warp) {
  return p.partial + warp_of_slot(p, slot, row0) * of_warp;
}

template <int kN>
__device__ __forceinline__ void store_partial(const float (&acc)[1][kN][4], const float (&factor)[2], float* target,
                                              int lane) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
    reinterpret_cast<float4*>(target)[32 * n + lane] = {acc[0][n][0] * factor[0], acc[0][n][1] * factor[0],
                                                        acc[0][n][2] * factor[1], acc[0][n][3] * factor[1]};
}

// How many items of the same line come next to item `number`, before (-1) or after it (1). By a warp.
__device__ __forceinline__ int items_of_line(const WorkItems& work, int number, int direction) {
  const int4* items = reinterpret_cast<const int4*>(work.items);
  const int line = items[number].x, lane = threadIdx.x % 32;
  for (int found = 0;; found += 32) {
    const int other = number + direction * (1 + found + lane);
    const unsigned same = __ballot_sync(~0u, other >= 0 && other < work.count && items[other].x == line);
    if (same != ~0u) return found + __popc(same);
  }
}

// Where the pieces of a line are to be found.
struct CutLine {
  int first_slot = 0, pieces = 0;

  CutLine() = default;
  // By a warp.
  __device__ __forceinline__ CutLine(const WorkItems& items, const ListedWork& one) {
    if (one.slot < 0) return;
    const int before = items_of_line(items, one.item, -1);
    first_slot = static_cast<int>(one.slot) - before;
    pieces = before + 1 + items_of_line(items, one.item, 1);
  }

  // Whether the warp, which has stored its partial result, is the last one of the line's to come here for these rows.
  // What the others have stored it then may read.
  __device__ __forceinline__ bool arrive_last(const AttentionProblem& p, int row0) const {
    ptx::await_previous_kernel();  // which sets what is counted to 0
    __threadfence();
    __syncwarp();
    int before = 0;
    if (threadIdx.x % 32 == 0) before = atomicAdd(p.ticket + 1 + warp_of_slot(p, first_slot, row0), 1);
    const bool last = __shfl_sync(~0u, before, 0) == pieces - 1;
    if (last) __threadfence();
    return last;
  }
};

// What all pieces left, by the warp that is the last to leave its own: out and lse of its 16 rows, each piece weighted
// by exp(lse - lse of all).
template <typename T, int kDim, typename Note>
__device__ __forceinline__ void combine_out_if_last(const AttentionProblem& p, const Note& note, int row0) {
  const CutLine line = note.line;
  if (!line.arrive_last(p, row0)) return;
  const Lane lane{ptx::lane_id()};
  const float* partial = partial_of_warp(p, line.first_slot, row0, partial_out_floats(kDim));
  const int64_t stride = p.block_size / 16 * partial_out_floats(kDim);
  auto lse_of = [&](int i, int half) { return partial[i * stride + 16 * kDim + lane.row + 8 * half]; };
  float top[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
  for (int i = 0; i < line.pieces; ++i)
    for (int half = 0; half < 2; ++half) top[half] = fmaxf(top[half], lse_of(i, half));
#pragma unroll 1
  for (int n0 = 0; n0 < kDim / 8; n0 += 4) {
    float x[1][4][4] = {}, factor[1][2], sum[2] = {};
#pragma unroll 2
    for (int i = 0; i < line.pieces; ++i) {
      float weight[2];
      for (int half = 0; half < 2; ++half) {  // no key in any piece: 0
        weight[half] = top[half] == -INFINITY ? 0.0f : ptx::exp2_approx((lse_of(i, half) - top[half]) * kLog2e);
        sum[half] += weight[half];
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float4 piece = reinterpret_cast<const float4*>(partial + i * stride)[32 * (n0 + n) + lane.id];
        x[0][n][0] = fmaf(weight[0], piece.x, x[0][n][0]), x[0][n][1] = fmaf(weight[0], piece.y, x[0][n][1]);
        x[0][n][2] = fmaf(weight[1], piece.z, x[0][n][2]), x[0][n][3] = fmaf(weight[1], piece.w, x[0][n][3]);
      }
    }
    const int rows = note.rows - row0;
    for (int half = 0; half < 2; ++half) {
      const int row = lane.row + 8 * half;
      factor[0][half] = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
      if (n0 == 0 && lane.col == 0 && row < rows)
        p.lse[note.lse + row0 + row] = sum[half] == 0.0f ? -INFINITY : top[half] + __log2f(sum[half]) * kLn2;
    }
    T* out = static_cast<T*>(p.out.data) + note.out + row0 * p.out.seq + 8 * n0;
    store_fragments<T>(x, factor, out, p.out.seq, rows, static_cast<int>(p.head_dim) - 8 * n0, lane);
  }
}

// The same in the backward pass: dk and dv of 16 keys, sums.
template <typename T, int kDim, typename Note>
__device__ __forceinline__ void combine_keys_if_last(const AttentionProblem& p, const AttentionGradients& g,
                                                     const Note& note, int row0) {
  const CutLine line = note.line;
  if (!line.arrive_last(p, row0)) return;
  const Lane lane{ptx::lane_id()};
  const float* partial = partial_of_warp(p, line.first_slot, row0, partial_dkv_floats(kDim));
  const int stride = static_cast<int>(p.block_size) / 16 * partial_dkv_floats(kDim);
#pragma unroll 1
  for (int n0 = 0; n0 < 2 * kDim / 8; n0 += 4) {
    float x[1][4][4] = {};
#pragma unroll 4
    for (int i = 0; i < line.pieces; ++i) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float4 piece = reinterpret_cast<const float4*>(partial + int64_t{i} * stride)[32 * (n0 + n) + lane.id];
        x[0][n][0] += piece.x, x[0][n][1] += piece.y, x[0][n][2] += piece.z, x[0][n][3] += piece.w;
      }
    }
    const bool of_v = n0 >= kDim / 8;
    const View& view = of_v ? g.dv : g.dk;
    const int column = 8 * n0 - of_v * kDim;
    const float factor = of_v ? (p.rng_state != nullptr ? p.keep_scale : 1.0f) : p.scale;
    const float factors[1][2] = {{factor, factor}};
    T* rows = static_cast<T*>(view.data) + note.batch * view.batch + note.head * view.head;
    store_fragments<T>(x, factors, rows + (note.key + row0) * view.seq + column, view.seq, note.rows - row0,
                       static_cast<int>(p.head_dim) - column, lane);
  }
}

}  // namespace flash_models
