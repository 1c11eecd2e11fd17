// SPDX-License-Identifier: Apache-2.0
//
// Counter-based dropout: whether (row, col) is kept depends on the seed, the batch, the head, the row and the column
// alone, so forward, backward, every tile shape, CPU and CUDA draw the same mask. Philox4x32 (Salmon et al., SC 2011)
// with 7 rounds, the fewest that pass BigCrush. One call serves 16 elements: those that one lane holds of a 16 x 32
// patch in the accumulator layout of mma.m16n8 (PTX ISA, "Matrix fragments for mma.m16n8k16").
#pragma once

#include <cstdint>

#include "sequence.h"
#ifdef __CUDACC__
#include "ampere/ptx.cuh"
#endif

namespace flash_models {

struct Philox {
  uint32_t word[4];
};

FM_HOST_DEVICE uint64_t multiply_wide(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return ptx::multiply_wide(a, b);
#else
  return uint64_t{a} * b;
#endif
}

FM_HOST_DEVICE Philox philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = multiply_wide(0xD2511F53u, c0), product1 = multiply_wide(0xCD9E8D57u, c2);
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// What all draws of one head share; read from the device once, not for every patch.
struct DropoutKey {
  uint64_t seed = 0;
  uint32_t offset = 0, batch_head = 0;

  FM_HOST_DEVICE DropoutKey(const int64_t* rng_state, int64_t batch_head)
      : batch_head(static_cast<uint32_t>(batch_head)) {
    if (rng_state == nullptr) return;
    seed = static_cast<uint64_t>(rng_state[0]);
    offset = static_cast<uint32_t>(rng_state[1]);
  }
};

// The 16 bytes of one lane's share of the patch (row / 16, col / 32). Element (row, col) belongs to lane
// (row % 8) * 4 + (col % 8) / 2; its byte is number (row % 16) / 8 * 2 + col % 2 of word (col % 32) / 8.
FM_HOST_DEVICE Philox dropout_patch(const DropoutKey& key, int64_t row_patch, int64_t col_patch, int lane) {
  return philox(key.seed, static_cast<uint32_t>(col_patch * 32 + lane), static_cast<uint32_t>(row_patch),
                key.batch_head, key.offset);
}

}  // namespace flash_models
