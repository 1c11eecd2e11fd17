// SPDX-License-Identifier: Apache-2.0
//
// Forward pass: Algorithm 1 of FlashAttention (arXiv 2205.14135) with the loops exchanged, so that a tile of queries stays in
// cache until it is finished, and with one query per vector lane. The line numbers are those of the paper's listing.
#pragma once

#include "cpu_tiles.h"

namespace flash_models::FM_ISA {

struct alignas(64) ForwardWorkspace {
  float query[kMaxHeadDim * kTile];  // Q^T, times scale
  float out[kMaxHeadDim * kTile];    // O^T, not yet divided by the sum
  float tile[kTile * kMaxHeadDim];   // K_j, then V_j
  float scores[kTile * kTile];       // S^T, then P^T
  float keep[kTile * kTile];         // dropout factors
  float row_max[kTile], row_sum[kTile], decay[kTile];
};

// Lines 10 to 12: S becomes P = exp(S - max), with the running maximum and sum of each lane brought up to date; decay is
// what earlier sums and outputs have to be multiplied with.
inline void online_softmax(int rows, int lanes, ForwardWorkspace& w) {
  for (int lane = 0; lane < lanes; lane += kWidth) {
    float* column = w.scores + lane;
    const Vec old_max = load(w.row_max + lane);
    Vec new_max = old_max;
    for (int j = 0; j < rows; ++j) new_max = max(load(column + j * kTile), new_max);
    // A lane that has seen no key yet keeps -inf; -inf - 0 gives the exp of 0 that it needs, -inf - -inf would be NaN.
    const Vec base = new_max == -kInfinity ? Vec{} : new_max;
    const Vec decay = exp(old_max - base);
    Vec sum = {};
    for (int j = 0; j < rows; ++j) {
      const Vec weight = exp(load(column + j * kTile) - base);
      store(column + j * kTile, weight);
      sum += weight;
    }
    store(w.row_max + lane, new_max);
    store(w.row_sum + lane, load(w.row_sum + lane) * decay + sum);
    store(w.decay + lane, decay);
  }
}

inline void forward_tile(const Head& head, int64_t tile, void* workspace) {
  ForwardWorkspace& w = *static_cast<ForwardWorkspace*>(workspace);
  const int64_t query_begin = tile * kTile;
  if (query_begin >= head.q_len) return;
  const int queries = static_cast<int>(min(kTile, head.q_len - query_begin));
  const int dim = head.head_dim;

  read_transposed(head, head.q, query_begin, queries, head.scale, w.query);
  for (int i = 0; i < dim * kTile; ++i) w.out[i] = 0.0f;
  for (int i = 0; i < kTile; ++i) w.row_max[i] = -kInfinity, w.row_sum[i] = 0.0f;

  // No query of the tile sees further than its last one.
  const int64_t key_hi = min(head.key_hi, query_begin + queries + head.reach);
  for_each_tile(head.rows, head.block_size, query_begin, head.key_lo, key_hi, [&](int64_t grid, int64_t begin, int keys) {
    read_tile(head, head.k, begin, keys, w.tile);
    multiply<Order::kRowMajor, Update::kAssign>(keys, dim, queries, w.tile, dim, w.query, w.scores);  // line 9
    if (begin + keys - 1 > query_begin + head.reach) mask_scores<Side::kQueries>(head.reach, query_begin, begin, keys, w.scores);
    online_softmax(keys, queries, w);
    if (head.rng_state != nullptr) {
      // After the sum: dropout acts on the normalised weights.
      dropout_factors<Side::kQueries>(head, query_begin, grid, w.keep);
      const float* keep = w.keep + (begin - grid) * kTile;
      for (int i = 0; i < keys * kTile; ++i) w.scores[i] *= keep[i];
    }
    read_tile(head, head.v, begin, keys, w.tile);
    multiply<Order::kTransposed, Update::kRescale>(dim, keys, queries, w.tile, dim, w.scores, w.out, w.decay);
  });

  for (int i = 0; i < queries; ++i) {  // lines 12 and 13, once instead of for every tile
    const bool has_key = w.row_sum[i] != 0.0f;
    write_lane(head, head.out, query_begin, i, has_key ? 1.0f / w.row_sum[i] : 0.0f, w.out);
    head.lse[query_begin + i] = has_key ? static_cast<float>(w.row_max[i] + __builtin_log(w.row_sum[i])) : -kInfinity;
  }
}

}  // namespace flash_models::FM_ISA
