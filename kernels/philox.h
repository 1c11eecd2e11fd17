// SPDX-License-Identifier: Apache-2.0
//
// Philox4x32 (Salmon et al., SC 2011): random words that a counter and a key name.
#pragma once

#include "dtype.h"
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
  static constexpr int kRounds = 7;  // the fewest that pass BigCrush

  uint32_t word[4];

  FM_HOST_DEVICE void round(uint32_t key0, uint32_t key1) {
    const uint64_t product0 = multiply_wide(0xD2511F53u, word[0]), product1 = multiply_wide(0xCD9E8D57u, word[2]);
    word[0] = static_cast<uint32_t>(product1 >> 32) ^ word[1] ^ key0;
    word[1] = static_cast<uint32_t>(product1);
    word[2] = static_cast<uint32_t>(product0 >> 32) ^ word[3] ^ key1;
    word[3] = static_cast<uint32_t>(product0);
  }
};

// The key, a seed, as the rounds want it one after the other.
struct PhiloxKey {
  uint32_t low, high;

  FM_HOST_DEVICE explicit PhiloxKey(uint64_t seed)
      : low(static_cast<uint32_t>(seed)), high(static_cast<uint32_t>(seed >> 32)) {}

  FM_HOST_DEVICE void advance() {
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
};

}  // namespace flash_models
