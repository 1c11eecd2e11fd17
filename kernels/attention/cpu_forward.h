// SPDX-License-Identifier: Apache-2.0
//
// Forward pass: Algorithm 1 of FlashAttention (arXiv 2205.14135) with the loops exchanged, so that a tile of queries
// stays in cache until it is finished, and with one query per vector lane. The line numbers are those of the paper's
// listing.
#pragma once

#include "cpu_dropout.h"
#include "cpu_tiles.h"

namespace flash_models::FM_ISA {

struct alignas(64) ForwardWorkspace {
  float query[kMaxHeadDim * kLanes];       // Q_i^T, times scale
  float out[kMaxHeadDim * kLanes];         // O_i^T, not yet divided by the sum
  float tile[kRowTokens * kMaxHeadDim];    // K_j, then V_j
  float scores[kRowTokens * kLanes];       // S_ij^T, then P_ij^T
  float keep[kRowTokens * kLanes];         // dropout factors
  float row_max[kLanes], row_sum[kLanes];  // m_i, l_i
  float decay[kLanes];
};

// Lines 10 to 12: S becomes P = exp(S - max), with the running maximum and sum of each lane brought up to date; decay
// is what earlier sums and outputs have to be multiplied with.
inline void online_softmax(int rows, int lanes, ForwardWorkspace& w) {
  for (int panel = 0; panel < lanes; panel += kPanel) {
    Vec largest[kPanelVectors], sum[kPanelVectors] = {};
    for (int v = 0; v < kPanelVectors; ++v) largest[v] = load(w.row_max + panel + v * kWidth);
    for (int j = 0; j < rows; ++j) {
      const float* line = w.scores + j * kLanes + panel;
      for (int v = 0; v < kPanelVectors; ++v) largest[v] = max(load(line + v * kWidth), largest[v]);
    }
    for (int v = 0; v < kPanelVectors; ++v) {
      const int lane = panel + v * kWidth;
      const Vec old = load(w.row_max + lane);
      store(w.row_max + lane, largest[v]);
      // A lane that has seen no key yet keeps -inf, and -inf - -inf would be NaN; -inf - 0 gives the weight 0 it needs.
      largest[v] = largest[v] == -kInfinity ? Vec{} : largest[v];
      store(w.decay + lane, exp(old - largest[v]));
    }
    for (int j = 0; j < rows; ++j) {
      float* line = w.scores + j * kLanes + panel;
      for (int v = 0; v < kPanelVectors; ++v) {
        const Vec weight = exp(load(line + v * kWidth) - largest[v]);
        store(line + v * kWidth, weight);
        sum[v] += weight;
      }
    }
    for (int v = 0; v < kPanelVectors; ++v) {
      const int lane = panel + v * kWidth;
      store(w.row_sum + lane, load(w.row_sum + lane) * load(w.decay + lane) + sum[v]);
    }
  }
}

inline void forward_tile(const Head& head, int64_t tile, void* workspace) {
  ForwardWorkspace& w = *static_cast<ForwardWorkspace*>(workspace);
  const int64_t query_begin = tile * head.tile;
  if (query_begin >= head.q_len) return;
  const int queries = static_cast<int>(min(head.tile, head.q_len - query_begin));
  const int dim = head.head_dim;

  read_transposed(head, head.q, query_begin, queries, head.scale, w.query);
  for (int i = 0; i < dim * kLanes; ++i) w.out[i] = 0.0f;
  for (int i = 0; i < kLanes; ++i) w.row_max[i] = -kInfinity, w.row_sum[i] = 0.0f;

  // No query of the tile sees further than its last one.
  const int64_t key_hi = min(head.key_hi, query_begin + queries + head.reach);
  for_each_tile(head.rows, head.block_size, query_begin, head.key_lo, key_hi, [&](const RowTile& keys) {
    read_tile(head, head.k, keys.begin, keys.rows, w.tile);
    multiply<Order::kRowMajor, Update::kAssign>(keys.rows, dim, queries, w.tile, dim, w.query, w.scores);  // line 9
    if (keys.begin + keys.rows - 1 > query_begin + head.reach) {
      mask_scores<Side::kQueries>(head.reach, query_begin, keys.begin, keys.rows, w.scores);
    }
    online_softmax(keys.rows, queries, w);
    if (head.rng_state != nullptr) {
      // After the sum: dropout acts on the normalised weights.
      dropout_factors<Side::kQueries>(head, query_begin, queries, keys.grid, w.keep);
      const float* keep = w.keep + (keys.begin - keys.grid) * kLanes;
      for (int i = 0; i < keys.rows * kLanes; ++i) w.scores[i] *= keep[i];
    }
    read_tile(head, head.v, keys.begin, keys.rows, w.tile);
    multiply<Order::kTransposed, Update::kRescale>(dim, keys.rows, queries, w.tile, dim, w.scores, w.out, w.decay);
  });

  for (int i = 0; i < queries; ++i) {  // lines 12 and 13, once instead of for every tile
    const bool has_key = w.row_sum[i] != 0.0f;
    write_lane(head, head.out, query_begin, i, has_key ? 1.0f / w.row_sum[i] : 0.0f, w.out);
    head.lse[query_begin + i] = has_key ? static_cast<float>(w.row_max[i] + __builtin_log(w.row_sum[i])) : -kInfinity;
  }
}

}  // namespace flash_models::FM_ISA
