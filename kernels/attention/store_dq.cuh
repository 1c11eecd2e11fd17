// SPDX-License-Identifier: Apache-2.0
//
// The fp32 sum of dQ on Hopper: how L2 treats it, and the last launch of the backward, which scales and rounds it.
#pragma once

#include "dispatch.cuh"
#include "hopper/tile.cuh"
#include "row_tiles.cuh"

namespace flash_models {

// Kept in L2 where all of it fits; else it would only drive out what the next tiles read.
inline uint64_t dq_cache_policy(const AttentionProblem& p, int dim) {
  return 4 * padded_rows(p) * dim <= int64_t{l2_bytes()} / 4 * 3 ? ptx::kCachedLongest : ptx::kCachedAsAll;
}

// dq = scale * dq_sum, one CTA a tile of 64 queries, four warps with 16 rows each.
constexpr int kStoredRows = 64;

template <typename T, int kDim, int kDqDim>
__global__ void __launch_bounds__(128)
    attention_bwd_store_dq_sm90(const __grid_constant__ AttentionProblem p,
                                const __grid_constant__ AttentionGradients g, int query_tiles) {
  const Lane lane;
  const int warp = threadIdx.x / 32;
  const Place place(p, blockIdx.x, query_tiles, false);
  const Sequence s = sequence_of(p, place.batch);
  const int q0 = place.tile * kStoredRows, row0 = q0 + 16 * warp;
  ptx::await_previous_kernel();
  if (q0 >= s.q_len) return;
  const float factor[1][2] = {{p.scale, p.scale}};
  T* out = static_cast<T*>(g.dq.data) + query_offset(g.dq, s, place.batch, place.head) + row0 * g.dq.seq;
  const float* sum = dq_tile(p, g.dq_sum, s, place.batch, place.head, q0, kDim);
#pragma unroll
  for (int share = 0; share < kDim / kDqDim; ++share) {
    alignas(16) float dq[1][kDqDim / 8][4];
#pragma unroll
    for (int n = 0; n < kDqDim / 8; ++n)
      reinterpret_cast<float4&>(dq[0][n]) =
          ptx::load_last_16(sum + (4 * share + warp) * 16 * kDqDim + 128 * n + 4 * lane.id);
    store_fragments<T>(dq, factor, out + share * kDqDim, g.dq.seq, static_cast<int>(s.q_len) - row0,
                       static_cast<int>(p.head_dim) - share * kDqDim, lane);
  }
}

template <typename T, int kDim, int kDqDim>
void store_dq(const AttentionProblem& p, const AttentionGradients& g) {
  const int query_tiles = static_cast<int>(ceil_div(p.seqlen_q, kStoredRows));
  launch<attention_bwd_store_dq_sm90<T, kDim, kDqDim>, 0, true>(
      "attention_bwd_store_dq_sm90", query_tiles * p.heads * p.batch, 128, p.stream, p, g, query_tiles);
}

}  // namespace flash_models
