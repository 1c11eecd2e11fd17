// SPDX-License-Identifier: Apache-2.0
//
// Where the backward pass adds up dQ, across the CTAs that own keys: fp32 tiles of 64 queries, in the order in which
// the accumulators of the kernel at work lie in its lanes, so that every addition is 512 contiguous bytes a warp.
#pragma once

#include "sequence.h"

namespace flash_models {

constexpr int kDqTile = 64;  // queries

// Query tiles of one head. A packed sequence starts at tile q_begin / 64 + batch, which leaves room for the last,
// partly filled tile of every sequence before it.
FM_HOST_DEVICE int64_t dq_tiles(const AttentionProblem& p) {
  return p.cu_seqlens_q != nullptr ? p.total_q / kDqTile + p.batch : p.batch * ((p.seqlen_q + kDqTile - 1) / kDqTile);
}

// The kDqTile * dim floats of the tile that starts at query q0 of a sequence.
FM_HOST_DEVICE float* dq_tile(const AttentionProblem& p, float* dq_sum, const Sequence& s, int64_t batch, int64_t head,
                              int64_t q0, int dim) {
  const int64_t first =
      p.cu_seqlens_q != nullptr ? s.q_begin / kDqTile + batch : batch * ((p.seqlen_q + kDqTile - 1) / kDqTile);
  return dq_sum + (head * dq_tiles(p) + first + q0 / kDqTile) * (kDqTile * dim);
}

}  // namespace flash_models
