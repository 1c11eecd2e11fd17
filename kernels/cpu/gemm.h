// SPDX-License-Identifier: Apache-2.0
//
// Products of small matrices held in cache: C = A B with B and, unless told otherwise, C in rows of kLanes floats, a
// column for each vector lane. What a lane computes stays in that lane, so a caller who puts one query (or one key) in
// each lane needs no horizontal operation anywhere.
#pragma once

#include "vector.h"

namespace flash_models::FM_ISA {

inline constexpr int kLanes = 128;

// Register block: kRows x kPanelVectors accumulators, enough independent chains to hide the latency of a multiply-add,
// within 32 vector registers (AVX-512) or 16.
inline constexpr int kRows = kWidth == 16 ? 8 : 4;
inline constexpr int kPanelVectors = 2;
inline constexpr int kPanel = kPanelVectors * kWidth;

enum class Order { kRowMajor, kTransposed };    // of A: element (i, l) at a[i * lda + l], or at a[l * lda + i]
enum class Update { kAssign, kAdd, kRescale };  // C = A B, C += A B, C = C diag(factor) + A B

template <Order kOrder, Update kUpdate, int kVectors>
inline void multiply_block(int depth, const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                           const float* factor) {
  // Summed from zero and added to C once: errors grow with the tile and the number of tiles, not with the whole
  // sequence.
  Vec sum[kRows][kVectors] = {};
  for (int l = 0; l < depth; ++l) {
    Vec line[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) line[j] = load(b + l * kLanes + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec element = broadcast(kOrder == Order::kRowMajor ? a[i * lda + l] : a[l * lda + i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] += element * line[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* target = c + i * ldc + j * kWidth;
      if constexpr (kUpdate == Update::kAdd) sum[i][j] += load(target);
      if constexpr (kUpdate == Update::kRescale) sum[i][j] += load(target) * load(factor + j * kWidth);
      store(target, sum[i][j]);
    }
  }
}

// A is rows x depth, B depth x lanes. Rows are computed in groups of kRows and lanes in groups of kPanel: A and C must
// be readable and writable up to the next multiple, and what lies there is of no consequence.
template <Order kOrder, Update kUpdate>
inline void multiply(int rows, int depth, int lanes, const float* a, int64_t lda, const float* b, float* c,
                     const float* factor = nullptr, int64_t ldc = kLanes) {
  for (int lane = 0; lane < lanes; lane += kPanel) {
    // A single query, as in text generation, would leave all but one of the panel's vectors idle.
    const auto block =
        lanes - lane <= kWidth ? multiply_block<kOrder, kUpdate, 1> : multiply_block<kOrder, kUpdate, kPanelVectors>;
    for (int row = 0; row < rows; row += kRows) {
      block(depth, a + (kOrder == Order::kRowMajor ? row * lda : row), lda, b + lane, c + row * ldc + lane, ldc,
            kUpdate == Update::kRescale ? factor + lane : nullptr);
    }
  }
}

}  // namespace flash_models::FM_ISA
