// SPDX-License-Identifier: Apache-2.0
//
// Backward pass: Algorithm 4 of FlashAttention (arXiv 2205.14135). Where there are heads enough for all threads, each
// takes whole heads: it owns one tile of keys after the other, sums dK and dV over the queries, and adds to dQ in main
// memory. Otherwise, and where results may not depend on the number of threads, in two sweeps: one owns tiles of
// queries and sums dQ over the keys, the other owns tiles of keys. Each recomputes the scores, 7 products instead of 5,
// so that every gradient has one owner and a fixed order of summation.
//
//   P = exp(scale Q K^T - lse)      dP = dO V^T      dS = P (Z dP - delta)      delta = rowsum(dO O)
//   dV = (P Z)^T dO                 dQ = scale dS K  dK = scale dS^T Q          Z = dropout factors
#pragma once

#include "cpu_dropout.h"
#include "cpu_tiles.h"

namespace flash_models::FM_ISA {

struct alignas(64) BackwardWorkspace {
  // The own tile, transposed: (scale Q, dO) and dQ, or (scale K, V) and (dK, dV).
  float first[kMaxHeadDim * kLanes], second[kMaxHeadDim * kLanes];
  float d_first[kMaxHeadDim * kLanes], d_second[kMaxHeadDim * kLanes];
  // The tile that passes by: (K, V), or (Q, dO).
  float other_first[kRowTokens * kMaxHeadDim], other_second[kRowTokens * kMaxHeadDim];
  float own_rows[kLanes * kLanes];     // K again, for dQ: a key a row
  float scores[kRowTokens * kLanes];   // S, then dS
  float weights[kRowTokens * kLanes];  // dP, then P Z
  float keep[kRowTokens * kLanes];     // Z
  float lse[kLanes], delta[kLanes];    // of the queries, which are the lanes or the rows
};

// A query without a key has lse -inf; +inf instead makes its weights exp(-inf) = 0.
inline float normaliser(float lse) { return lse == -kInfinity ? kInfinity : lse; }

// delta of the owned queries from O^T and dO^T. Summed in the order in which multiply() sums dP, so that the two cancel
// exactly where a query has a single key.
inline void row_products(int dim, int lanes, const float* out, const float* dout, float* delta) {
  for (int lane = 0; lane < lanes; lane += kWidth) {
    Vec sum = {};
    for (int d = 0; d < dim; ++d) sum += load(out + d * kLanes + lane) * load(dout + d * kLanes + lane);
    store(delta + lane, sum);
  }
}

// The same for a tile of the head whose dO^T is in w.second; O^T passes through `out`.
inline void write_delta(const Head& head, int64_t begin, int lanes, float* out, BackwardWorkspace& w) {
  read_transposed(head, head.out, begin, lanes, 1.0f, out);
  row_products(head.head_dim, lanes, out, w.second, w.delta);
  for (int i = 0; i < lanes; ++i) head.delta[begin + i] = w.delta[i];
}

inline void backward_rows(const Head& head, int64_t tile, void* workspace) {
  BackwardWorkspace& w = *static_cast<BackwardWorkspace*>(workspace);
  const int64_t begin = tile * head.tile;
  const int lanes = static_cast<int>(min(head.tile, head.q_len - begin));
  read_transposed(head, head.dout, begin, lanes, 1.0f, w.second);
  write_delta(head, begin, lanes, w.first, w);
}

inline void backward_store(const Head& head, int64_t tile, void*) {
  const int64_t begin = tile * head.tile, end = min(begin + head.tile, head.q_len);
  for (int64_t i = begin; i < end; ++i) {
    float* row = head.dq_sum + i * head.dq_stride;
    for (int d = 0; d < head.head_dim; ++d) row[d] *= head.scale;
    write_row(head.dtype, head.dq.data, i * head.dq.stride, head.head_dim, row);
  }
}

static_assert(kDqPad % kPanel == 0 && kDqPad >= kRows);

// dQ of the queries of a tile += dS K, of the keys in lanes [first, last).
inline void add_to_queries(const Head& head, const RowTile& queries, int first, int last, BackwardWorkspace& w) {
  const int rows = queries.rows;
  for (int i = rows; i % kRows != 0; ++i)  // products are computed of so many rows, and these are other queries'
    for (int lane = first; lane < last; ++lane) w.scores[i * kLanes + lane] = 0.0f;
  multiply<Order::kRowMajor, Update::kAdd>(rows, last - first, head.head_dim, w.scores + first, kLanes,
                                           w.own_rows + first * kLanes, head.dq_sum + queries.begin * head.dq_stride,
                                           nullptr, head.dq_stride);
}

template <Side kOwn>
inline void score_gradients(const float* keep, int rows, int lanes, BackwardWorkspace& w) {
  for (int i = 0; i < rows; ++i) {
    for (int lane = 0; lane < lanes; lane += kWidth) {
      const int at = i * kLanes + lane;
      const Vec lse = kOwn == Side::kQueries ? load(w.lse + lane) : broadcast(w.lse[i]);
      const Vec delta = kOwn == Side::kQueries ? load(w.delta + lane) : broadcast(w.delta[i]);
      const Vec factor = keep != nullptr ? load(keep + at) : broadcast(1.0f);
      const Vec weight = exp(load(w.scores + at) - lse);
      store(w.scores + at, weight * (factor * load(w.weights + at) - delta));
      store(w.weights + at, weight * factor);
    }
  }
}

template <Side kOwn>
inline void backward_tile(const Head& head, int64_t tile, void* workspace) {
  constexpr bool kOwnsQueries = kOwn == Side::kQueries;
  BackwardWorkspace& w = *static_cast<BackwardWorkspace*>(workspace);
  const int64_t own_begin = tile * head.tile, own_len = kOwnsQueries ? head.q_len : head.k_len;
  if (own_begin >= own_len) return;
  const int lanes = static_cast<int>(min(head.tile, own_len - own_begin));
  const int dim = head.head_dim;
  const Matrix &other_first = kOwnsQueries ? head.k : head.q, &other_second = kOwnsQueries ? head.v : head.dout;

  read_transposed(head, kOwnsQueries ? head.q : head.k, own_begin, lanes, head.scale, w.first);
  read_transposed(head, kOwnsQueries ? head.dout : head.v, own_begin, lanes, 1.0f, w.second);

  int64_t lo = 0, hi = 0;  // tokens of the other side that any of the own ones meets
  // Own keys outside [first, last) are masked: their lanes gather weights that do not exist.
  const int first = static_cast<int>(kOwnsQueries ? 0 : max(head.key_lo - own_begin, 0));
  const int last = static_cast<int>(kOwnsQueries ? lanes : min(head.key_hi - own_begin, lanes));
  if constexpr (kOwnsQueries) {
    lo = head.key_lo, hi = min(head.key_hi, own_begin + lanes + head.reach);
    write_delta(head, own_begin, lanes, w.d_first, w);
    for (int i = 0; i < kLanes; ++i) w.lse[i] = i < lanes ? normaliser(head.lse[own_begin + i]) : kInfinity;
  } else {
    lo = max(0, max(own_begin, head.key_lo) - head.reach), hi = first < last ? head.q_len : 0;
    if (head.dq_sum != nullptr)
      for (int i = first; i < last; ++i)
        read_row(head.dtype, head.k.data, (own_begin + i) * head.k.stride, dim, w.own_rows + i * kLanes);
  }
  for (int i = 0; i < dim * kLanes; ++i) w.d_first[i] = w.d_second[i] = 0.0f;

  const BlockList& list = kOwnsQueries ? head.rows : head.columns;
  for_each_tile(list, head.block_size, own_begin, lo, hi, [&](const RowTile& other) {
    const int rows = other.rows;
    read_tile(head, other_first, other.begin, rows, w.other_first);
    read_tile(head, other_second, other.begin, rows, w.other_second);
    if constexpr (!kOwnsQueries) {
      for (int i = 0; i < rows; ++i) {
        w.lse[i] = normaliser(head.lse[other.begin + i]), w.delta[i] = head.delta[other.begin + i];
      }
    }
    multiply<Order::kRowMajor, Update::kAssign>(rows, dim, lanes, w.other_first, dim, w.first, w.scores);
    multiply<Order::kRowMajor, Update::kAssign>(rows, dim, lanes, w.other_second, dim, w.second, w.weights);
    const int64_t last_key = kOwnsQueries ? other.begin + rows - 1 : own_begin + lanes - 1;
    const int64_t first_query = kOwnsQueries ? own_begin : other.begin;
    if (last_key > first_query + head.reach) mask_scores<kOwn>(head.reach, own_begin, other.begin, rows, w.scores);
    const float* keep = nullptr;
    if (head.rng_state != nullptr) {
      dropout_factors<kOwn>(head, own_begin, lanes, other.grid, w.keep);
      keep = w.keep + (other.begin - other.grid) * kLanes;
    }
    score_gradients<kOwn>(keep, rows, lanes, w);
    multiply<Order::kTransposed, Update::kAdd>(dim, rows, lanes, w.other_first, dim, w.scores, w.d_first);
    if constexpr (!kOwnsQueries) {
      multiply<Order::kTransposed, Update::kAdd>(dim, rows, lanes, w.other_second, dim, w.weights, w.d_second);
      if (head.dq_sum != nullptr) add_to_queries(head, other, first, last, w);
    }
  });

  for (int i = 0; i < lanes; ++i) {
    if constexpr (kOwnsQueries) {
      write_lane(head, head.dq, own_begin, i, head.scale, w.d_first);
    } else if (i >= first && i < last) {
      write_lane(head, head.dk, own_begin, i, head.scale, w.d_first);
      write_lane(head, head.dv, own_begin, i, 1.0f, w.d_second);
    } else {
      write_zeros(head, head.dk, own_begin, i);
      write_zeros(head, head.dv, own_begin, i);
    }
  }
}

}  // namespace flash_models::FM_ISA
