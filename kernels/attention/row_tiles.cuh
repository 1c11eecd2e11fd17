// SPDX-License-Identifier: Apache-2.0
//
// The scratch memory of the backward pass on CUDA. What it keeps of a query row is laid out in tiles of 128 rows that
// belong to one sequence and head each: whole tiles can be copied and added up without a look at where a sequence ends.
// Of dQ, fp32, a tile holds the accumulators in the order in which they lie in the lanes of the kernel at work, so that
// every addition is of contiguous bytes.
#pragma once

#include "sequence.h"

namespace flash_models {

constexpr int kRowTile = 128;  // the most rows that a kernel reads at once: what lies behind them is another sequence's

FM_HOST_DEVICE int64_t row_tiles_of_sequence(const AttentionProblem& p) {
  return (p.seqlen_q + kRowTile - 1) / kRowTile;
}

// Tiles of one head. A packed sequence starts at tile q_begin / 128 + batch, which leaves room for the last, partly
// filled tile of every sequence before it.
FM_HOST_DEVICE int64_t row_tiles(const AttentionProblem& p) {
  return p.cu_seqlens_q != nullptr ? p.total_q / kRowTile + p.batch : p.batch * row_tiles_of_sequence(p);
}

FM_HOST_DEVICE int64_t padded_rows(const AttentionProblem& p) { return p.heads * row_tiles(p) * kRowTile; }

// The row of (sequence, head, query 0), a multiple of 128.
FM_HOST_DEVICE int64_t padded_row(const AttentionProblem& p, const Sequence& s, int64_t batch, int64_t head) {
  const int64_t first = p.cu_seqlens_q != nullptr ? s.q_begin / kRowTile + batch : batch * row_tiles_of_sequence(p);
  return (head * row_tiles(p) + first) * kRowTile;
}

// dQ from query q0, a multiple of 64, of a sequence on.
FM_HOST_DEVICE float* dq_tile(const AttentionProblem& p, float* dq_sum, const Sequence& s, int64_t batch, int64_t head,
                              int64_t q0, int dim) {
  return dq_sum + (padded_row(p, s, batch, head) + q0) * dim;
}

}  // namespace flash_models
