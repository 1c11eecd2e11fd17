// SPDX-License-Identifier: Apache-2.0
//
// Counter-based dropout: whether (row, col) is kept depends on the seed, the batch, the head, the row and the column
// alone, so forward, backward, every tile shape, CPU and CUDA draw the same mask. Philox4x32 (Salmon et al., SC 2011)
// with 7 rounds, the fewest that pass BigCrush. Two calls serve the 32 elements that one lane of a warp holds of a
// 32 x 32 patch in the accumulator layout of mma.m16n8 (PTX ISA, "Matrix fragments for mma.m16n8k16").
//
// Their 8 words of random bits are a number of 8 bits for each element, a bit from each word, and what is below the
// threshold is dropped. So all 32 are compared at once, and a word with a bit for each results.
#pragma once

#include <cstdint>

#include "sequence.h"
#ifdef __CUDACC__
#include "ampere/ptx.cuh"
#endif

namespace flash_models {

FM_HOST_DEVICE uint64_t multiply_wide(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return ptx::multiply_wide(a, b);
#else
  return uint64_t{a} * b;
#endif
}

struct Philox {
  uint32_t word[4];

  FM_HOST_DEVICE void round(uint32_t key0, uint32_t key1) {
    const uint64_t product0 = multiply_wide(0xD2511F53u, word[0]), product1 = multiply_wide(0xCD9E8D57u, word[2]);
    word[0] = static_cast<uint32_t>(product1 >> 32) ^ word[1] ^ key0;
    word[1] = static_cast<uint32_t>(product1);
    word[2] = static_cast<uint32_t>(product0 >> 32) ^ word[3] ^ key1;
    word[3] = static_cast<uint32_t>(product0);
  }
};

// The draws of one head.
struct Dropout {
  const uint32_t* zeros;  // AttentionProblem::threshold_zeros
  uint64_t seed = 0;
  uint32_t offset = 0, batch_head;

  FM_HOST_DEVICE Dropout(const int64_t* rng_state, int64_t batch_head, const uint32_t* threshold_zeros)
      : zeros(threshold_zeros), batch_head(static_cast<uint32_t>(batch_head)) {
    if (rng_state == nullptr) return;
    seed = static_cast<uint64_t>(rng_state[0]);
    offset = static_cast<uint32_t>(rng_state[1]);
  }

  FM_HOST_DEVICE Dropout(const AttentionProblem& p, int64_t batch_head)
      : Dropout(p.rng_state, batch_head, p.threshold_zeros) {}

  // One lane's share of patch (row / 32, col / 32), a bit for each element that is kept. Element (row, col) belongs to
  // lane (row % 8) * 4 + (col % 8) / 2; its bit is number 7 - (row % 32 / 16 * 4 + col % 32 / 8) of byte
  // row % 16 / 8 * 2 + col % 2.
  FM_HOST_DEVICE uint32_t kept(int64_t row_patch, int64_t col_patch, int lane) const {
    const uint32_t column = static_cast<uint32_t>(col_patch * 64 + lane), row = static_cast<uint32_t>(row_patch);
    Philox high{{column, row, batch_head, offset}}, low{{column + 32, row, batch_head, offset}};
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < 7; ++round) {
      high.round(key0, key1);
      low.round(key0, key1);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    // number >= threshold, from the lowest bit up: a bit that equals the threshold's leaves it to the lower ones
    uint32_t kept = ~0u;
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int bit = 7; bit >= 0; --bit) {
      const uint32_t drawn = bit < 4 ? high.word[bit] : low.word[bit - 4];
      kept = (drawn & kept) | ((drawn | kept) & zeros[bit]);  // the majority of the three
    }
    return kept;
  }
};

}  // namespace flash_models
