// SPDX-License-Identifier: Apache-2.0
//
// What forward and backward share: reading and writing tiles, walking the tiles that a tile meets, masks and dropout.
//
// A kernel owns one tile of up to kTile tokens, one per vector lane, and keeps it transposed: element (d, lane) at
// [d * kTile + lane]. The tokens of the other side pass by in tiles of rows x head_dim. Scores of a pair of tiles are
// rows x kTile. Own tiles start at multiples of kTile, and so do the tiles of the grid that the other side is cut into.
#pragma once

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu_head.h"
#include "dropout.h"

namespace flash_models::FM_ISA {

inline constexpr int kMaxHeadDim = 128;

enum class Side { kQueries, kKeys };  // which side of the score matrix a tile owns, one token per lane

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Tokens [begin, begin + rows) as rows x head_dim.
inline void read_tile(const Head& head, const Matrix& m, int64_t begin, int rows, float* tile) {
  for (int i = 0; i < rows; ++i) {
    read_row(head.dtype, m.data, (begin + i) * m.stride, head.head_dim, tile + i * head.head_dim);
  }
}

// The same times factor, transposed to head_dim x kTile; lanes from `lanes` to the end of their panel become zero.
inline void read_transposed(const Head& head, const Matrix& m, int64_t begin, int lanes, float factor, float* tile) {
  float row[kMaxHeadDim];
  for (int i = 0; i < lanes; ++i) {
    read_row(head.dtype, m.data, (begin + i) * m.stride, head.head_dim, row);
    for (int d = 0; d < head.head_dim; ++d) tile[d * kTile + i] = factor * row[d];
  }
  for (int i = lanes; i % kPanel != 0; ++i) {
    for (int d = 0; d < head.head_dim; ++d) tile[d * kTile + i] = 0.0f;
  }
}

// Writes lane i of head_dim x kTile, times factor, to token begin + i.
inline void write_lane(const Head& head, const Matrix& m, int64_t begin, int i, float factor, const float* tile) {
  float row[kMaxHeadDim];
  for (int d = 0; d < head.head_dim; ++d) row[d] = factor * tile[d * kTile + i];
  write_row(head.dtype, m.data, (begin + i) * m.stride, head.head_dim, row);
}

inline void write_zeros(const Head& head, const Matrix& m, int64_t begin, int i) {
  const float row[kMaxHeadDim] = {};
  write_row(head.dtype, m.data, (begin + i) * m.stride, head.head_dim, row);
}

// Calls visit(grid, begin, rows) for the tokens of the other side in [lo, hi) that meet the own tile, in ascending order:
// all of them, or the listed blocks. `grid` is the tile boundary at or before begin.
template <class Visit>
inline void for_each_tile(const BlockList& list, int64_t block_size, int64_t own_begin, int64_t lo, int64_t hi,
                          const Visit& visit) {
  const auto visit_range = [&](int64_t from, int64_t to) {
    for (int64_t grid = from - from % kTile; grid < to; grid += kTile) {
      const int64_t begin = max(grid, from);
      visit(grid, begin, static_cast<int>(min(grid + kTile, to) - begin));
    }
  };
  if (list.start == nullptr) {
    visit_range(lo, hi);
    return;
  }
  const int64_t line = own_begin / block_size;
  for (int64_t at = list.start[line]; at < list.start[line + 1]; ++at) {
    const int64_t block = list.index[at] * block_size;
    visit_range(max(block, lo), min(block + block_size, hi));
  }
}

// Scores that the mask j <= i + reach rules out become -inf. The pair of tiles starts at row `begin`, lane `own_begin`.
template <Side kOwn>
inline void mask_scores(int64_t reach, int64_t own_begin, int64_t begin, int rows, float* scores) {
  for (int i = 0; i < rows; ++i) {
    // Lane l is query own_begin + l, masked below first; or key own_begin + l, masked from first on.
    const int64_t first = kOwn == Side::kQueries ? begin + i - reach - own_begin : begin + i + reach + 1 - own_begin;
    const int64_t edge = min(max(first, 0), kTile);
    const int64_t from = kOwn == Side::kQueries ? 0 : edge, to = kOwn == Side::kQueries ? edge : kTile;
    for (int64_t l = from; l < to; ++l) scores[i * kTile + l] = -kInfinity;
  }
}

// 0 or keep_scale for each score of the pair of tiles at (grid, own_begin), both multiples of kTile. See dropout.h for the
// patches of 16 queries x 32 keys whose bytes come from 32 counters.
template <Side kOwn>
inline void dropout_factors(const Head& head, int64_t own_begin, int64_t grid, float* factors) {
  const int64_t query_begin = kOwn == Side::kQueries ? own_begin : grid;
  const int64_t key_begin = kOwn == Side::kQueries ? grid : own_begin;
  const uint32_t threshold = head.dropout_threshold;
  const float keep_scale = head.keep_scale;
  for (int64_t i = 0; i < kTile; i += 16) {
    for (int64_t j = 0; j < kTile; j += 32) {
      uint32_t word[4][32];
      for (int lane = 0; lane < 32; ++lane) {
        const Philox bytes = dropout_patch(head.rng_state, head.batch_head, (query_begin + i) / 16, (key_begin + j) / 32, lane);
        word[0][lane] = bytes.word[0], word[1][lane] = bytes.word[1], word[2][lane] = bytes.word[2], word[3][lane] = bytes.word[3];
      }
      for (int row = 0; row < 16; ++row) {
        for (int col = 0; col < 32; ++col) {
          const uint32_t shift = static_cast<uint32_t>(row / 8 * 16 + col % 2 * 8);
          const uint32_t byte = (word[col / 8][row % 8 * 4 + col % 8 / 2] >> shift) & 0xFFu;
          const int64_t at = kOwn == Side::kQueries ? (j + col) * kTile + i + row : (i + row) * kTile + j + col;
          factors[at] = byte < threshold ? 0.0f : keep_scale;
        }
      }
    }
  }
}

}  // namespace flash_models::FM_ISA
