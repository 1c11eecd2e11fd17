// SPDX-License-Identifier: Apache-2.0
//
// What forward and backward share: reading and writing tiles, walking the tiles that a tile meets, masks and dropout.
//
// A kernel owns a tile of up to kLanes tokens, one per vector lane, and keeps it transposed: element (d, lane) at
// [d * kLanes + lane]. The tokens of the other side pass by in tiles of up to kRowTokens x head_dim, so the scores of a
// pair of tiles are kRowTokens x kLanes. Own tiles start at multiples of Head::tile, the others at multiples of
// kRowTokens or, where a mask cuts them off, later.
#pragma once

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu_head.h"
#include "dropout.h"

namespace flash_models::FM_ISA {

inline constexpr int kMaxHeadDim = 128;
inline constexpr int kRowTokens = 64;

enum class Side { kQueries, kKeys };  // which side of the score matrix a tile owns, one token per lane

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Tokens [begin, begin + rows) as rows x head_dim.
inline void read_tile(const Head& head, const Matrix& m, int64_t begin, int rows, float* tile) {
  for (int i = 0; i < rows; ++i) {
    read_row(head.dtype, m.data, (begin + i) * m.stride, head.head_dim, tile + i * head.head_dim);
  }
}

// The own tile, times factor, transposed to head_dim x kLanes; lanes from `lanes` to the end of their panel become
// zero.
inline void read_transposed(const Head& head, const Matrix& m, int64_t begin, int lanes, float factor, float* tile) {
  float row[kMaxHeadDim];
  for (int i = 0; i < lanes; ++i) {
    read_row(head.dtype, m.data, (begin + i) * m.stride, head.head_dim, row);
    for (int d = 0; d < head.head_dim; ++d) tile[d * kLanes + i] = factor * row[d];
  }
  for (int i = lanes; i % kPanel != 0; ++i) {
    for (int d = 0; d < head.head_dim; ++d) tile[d * kLanes + i] = 0.0f;
  }
}

// Writes lane i of head_dim x kLanes, times factor, to token begin + i.
inline void write_lane(const Head& head, const Matrix& m, int64_t begin, int i, float factor, const float* tile) {
  float row[kMaxHeadDim];
  for (int d = 0; d < head.head_dim; ++d) row[d] = factor * tile[d * kLanes + i];
  write_row(head.dtype, m.data, (begin + i) * m.stride, head.head_dim, row);
}

inline void write_zeros(const Head& head, const Matrix& m, int64_t begin, int i) {
  const float row[kMaxHeadDim] = {};
  write_row(head.dtype, m.data, (begin + i) * m.stride, head.head_dim, row);
}

// Tokens [begin, begin + rows) of the other side. `grid` is the multiple of kRowTokens at or before begin.
struct RowTile {
  int64_t grid, begin;
  int rows;
};

// Calls visit(tile) for the tokens of the other side in [lo, hi) that meet the own tile, in ascending order: all of
// them, or those of the listed blocks.
template <class Visit>
inline void for_each_tile(const BlockList& list, int64_t block_size, int64_t own_begin, int64_t lo, int64_t hi,
                          const Visit& visit) {
  const auto walk = [&](int64_t from, int64_t to) {
    for (int64_t grid = from - from % kRowTokens; grid < to; grid += kRowTokens) {
      const int64_t begin = max(grid, from);
      visit(RowTile{grid, begin, static_cast<int>(min(grid + kRowTokens, to) - begin)});
    }
  };
  if (list.start == nullptr) {
    walk(lo, hi);
    return;
  }
  const int64_t line = own_begin / block_size;
  for (int64_t at = list.start[line]; at < list.start[line + 1]; ++at) {
    const int64_t block = list.index[at] * block_size;
    walk(max(block, lo), min(block + block_size, hi));
  }
}

// Scores that the mask j <= i + reach rules out become -inf. The pair of tiles starts at row `begin`, lane `own_begin`.
template <Side kOwn>
inline void mask_scores(int64_t reach, int64_t own_begin, int64_t begin, int rows, float* scores) {
  for (int i = 0; i < rows; ++i) {
    // Lane l is query own_begin + l, masked below `edge`; or key own_begin + l, masked from `edge` on.
    const int64_t first = kOwn == Side::kQueries ? begin + i - reach - own_begin : begin + i + reach + 1 - own_begin;
    const int64_t edge = min(max(first, 0), kLanes);
    const int64_t from = kOwn == Side::kQueries ? 0 : edge, to = kOwn == Side::kQueries ? edge : kLanes;
    for (int64_t l = from; l < to; ++l) scores[i * kLanes + l] = -kInfinity;
  }
}

}  // namespace flash_models::FM_ISA
