// SPDX-License-Identifier: Apache-2.0
//
// Counter-based dropout: whether (row, col) is kept depends on the seed, the batch, the head, the row and the column
// alone, so forward, backward, every tile shape, CPU and CUDA draw the same mask. A call of Philox serves the 32
// elements that one lane of a warp holds of a 32 x 32 patch in the accumulator layout of mma.m16n8 (PTX ISA, "Matrix
// fragments for mma.m16n8k16").
//
// Its 4 words of random bits after six rounds, and the 4 that they become in two more, are a number of 8 bits for each
// element, a bit from each word, and what is below the threshold is dropped. So all 32 are compared at once, and a word
// with a bit for each results. The later words, of one round more than pass BigCrush, are the upper 4 bits; the earlier
// ones decide where those equal the threshold's, for one element of 16. (Among 2.5e7 pairs of each kind, of
// neighbouring elements and lanes, drops have no correlation to be seen; with five and seven rounds they have up to
// 0.1%.)
#pragma once

#include <cstdint>

#include "philox.h"
#include "sequence.h"

namespace flash_models {

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
    Philox drawn(static_cast<uint32_t>(col_patch * 32 + lane), static_cast<uint32_t>(row_patch), batch_head, offset,
                 seed);
    // number >= threshold, from the lowest bit up: a bit that equals the threshold's leaves it to the lower ones
    uint32_t kept = ~0u;
    auto compare = [&](const uint32_t* zeros_of_4) {
#ifdef __CUDACC__
#pragma unroll
#endif
      for (int bit = 3; bit >= 0; --bit)  // the majority of the three
        kept = (drawn.word[bit] & kept) | ((drawn.word[bit] | kept) & zeros_of_4[bit]);
    };
    drawn.rounds<6>();
    compare(zeros + 4);
    drawn.rounds<2>();
    compare(zeros);
    return kept;
  }
};

}  // namespace flash_models
