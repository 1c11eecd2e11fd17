// SPDX-License-Identifier: Apache-2.0
//
// Dropout on accumulator fragments. A 16 x 32 patch of (query, key) is one Philox call a lane; see dropout.h.
#pragma once

#include "ampere/tile.cuh"
#include "dropout.h"

namespace flash_models {

// Bit i says whether byte i of the lane's share keeps its element.
__device__ __forceinline__ uint32_t keep_bits(const Philox& bytes, uint32_t threshold) {
  uint32_t bits = 0;
  const uint32_t limit = threshold * 0x01010101u;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    // 0xFF in every byte that is >= its limit, one bit of each kept; the multiply gathers four bits into a nibble.
    const uint32_t kept = __vcmpgeu4(bytes.word[word], limit) & 0x01010101u;
    bits |= ((kept * 0x01020408u) >> 24) << (4 * word);
  }
  return bits;
}

// What is kept of kM x kN fragments in natural layout: rows are queries q0 .., columns keys k0 .. (multiples of 32).
// Drawn apart from its use, so that the draw can run while products are under way.
template <int kM, int kN>
struct KeepBits {
  static_assert(kN % 4 == 0);
  uint32_t bits[kM][kN / 4];

  __device__ __forceinline__ void draw(const AttentionProblem& p, int64_t batch_head, int q0, int k0,
                                       const Lane& lane) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int patch = 0; patch < kN / 4; ++patch)
        bits[m][patch] = keep_bits(dropout_patch(p.rng_state, batch_head, q0 / 16 + m, k0 / 32 + patch, lane.id),
                                   p.dropout_threshold);
  }

  // Zeroes the dropped elements.
  __device__ __forceinline__ void drop(float (&x)[kM][kN][4]) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!(bits[m][n / 4] >> (4 * (n % 4) + i) & 1u)) x[m][n][i] = 0.0f;
  }
};

// The same bits for transposed scores: rows are 32 keys, columns 16 queries. A lane draws its natural share; the halves
// of its word that belong to even and to odd keys are two elements of an 8x8 matrix of 16-bit words, and one movmatrix
// hands every lane the words of its transposed position. In the result bit 4 * key_tile + 2 * query_tile (+16 for the
// second of the lane's two queries) belongs to key 8 * key_tile + lane.row and query 8 * query_tile + lane.col.
__device__ __forceinline__ uint32_t keep_bits_transposed(uint32_t bits) {
  return ptx::movmatrix_transposed((bits & 0x5555u) | ((bits & 0xAAAAu) << 15));
}

// What is kept of kN transposed fragments of one warp: rows are 16 keys k0 .., columns queries q0 .. (multiples of 16).
template <int kN>
struct KeepTransposed {
  static_assert(kN % 2 == 0);
  uint32_t bits[kN / 2];  // of 16 queries each

  __device__ __forceinline__ void draw(const AttentionProblem& p, int64_t batch_head, int q0, int k0,
                                       const Lane& lane) {
    const int upper = k0 / 16 % 2;  // which half of a patch of 32 keys
#pragma unroll
    for (int patch = 0; patch < kN / 2; ++patch)
      bits[patch] =
          keep_bits_transposed(keep_bits(dropout_patch(p.rng_state, batch_head, q0 / 16 + patch, k0 / 32, lane.id),
                                         p.dropout_threshold)) >>
          (8 * upper);
  }

  // Whether element i of fragment n is kept.
  __device__ __forceinline__ bool kept(int n, int i) const {
    return bits[n / 2] >> (4 * (i / 2) + 2 * (n % 2) + 16 * (i % 2)) & 1u;
  }
};

}  // namespace flash_models
