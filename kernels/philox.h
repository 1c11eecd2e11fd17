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

  uint32_t word[4];  // at first the counter
  uint32_t key_low, key_high;

  FM_HOST_DEVICE Philox(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint64_t seed)
      : word{a, b, c, d}, key_low(static_cast<uint32_t>(seed)), key_high(static_cast<uint32_t>(seed >> 32)) {}

  template <int kTimes>
  FM_HOST_DEVICE void rounds() {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int i = 0; i < kTimes; ++i) {
      const uint64_t product0 = multiply_wide(0xD2511F53u, word[0]), product1 = multiply_wide(0xCD9E8D57u, word[2]);
      word[0] = static_cast<uint32_t>(product1 >> 32) ^ word[1] ^ key_low;
      word[1] = static_cast<uint32_t>(product1);
      word[2] = static_cast<uint32_t>(product0 >> 32) ^ word[3] ^ key_high;
      word[3] = static_cast<uint32_t>(product0);
      key_low += 0x9E3779B9u;
      key_high += 0xBB67AE85u;
    }
  }
};

}  // namespace flash_models
