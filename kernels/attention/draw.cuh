// SPDX-License-Identifier: Apache-2.0
//
// Who draws for dropout on Hopper: the three warps of the producer's warpgroup that copy nothing. They follow the
// producer's notes as the consumers do, decide a tile ahead what is kept, and hand it over through shared memory, a bit
// an element. A consumer's chain of products and exponentials, which bounds the kernels, is then hardly longer than
// without dropout.
#pragma once

#include "dropout.cuh"
#include "hopper/ptx.cuh"
#include "ring.cuh"

namespace flash_models {

constexpr int kDrawers = 3;  // warps 1 .. 3 of a CTA

// A drawer has few registers and time enough: its loops over patches are not unrolled.
class Drawer {
 public:
  __device__ __forceinline__ Drawer(const AttentionProblem& p, int64_t batch_head, int lane)
      : dropout_(p, batch_head), lane_(lane) {}

  // A word of KeepPacked: 16 queries x 64 keys.
  __device__ __forceinline__ uint32_t packed(int q0, int k0) const {
    uint32_t word = 0;
#pragma unroll 1
    for (int patch = 0; patch < 2; ++patch) {
      const Philox bytes = dropout_patch(dropout_.key, q0 / 16, k0 / 32 + patch, lane_);
      word |= KeepPacked<8>::share(dropout_.threshold, bytes, patch);
    }
    return word;
  }

  // A word of KeepTransposed<2, ..> for either half of 32 keys: 64 queries x 32 keys.
  __device__ __forceinline__ void transposed(int q0, int k0, uint32_t (&word)[2]) const {
    word[0] = word[1] = 0;
#pragma unroll 1
    for (int patch = 0; patch < 4; ++patch) {
      const uint32_t bits = draw_transposed(dropout_, q0 / 16 + patch, k0 / 32, lane_);
#pragma unroll
      for (int half = 0; half < 2; ++half) word[half] |= KeepTransposed<2, 8>::share(bits, 2 * half, patch);
    }
  }

 private:
  Dropout dropout_;
  int lane_;
};

// The bits in shared memory: kWords words for each lane of each of kWarps consumer warps, in kStages stages.
template <int kWarps, int kWords, int kStages>
struct KeptBits {
  static constexpr int kBytes = kStages * kWarps * kWords * 128, kBarriers = 2 * kStages;
  uint32_t base, barriers;

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(kStages + stage); }
  __device__ __forceinline__ uint32_t& word(int stage, int warp, int i, int lane) const {
    return *static_cast<uint32_t*>(
        __cvta_shared_to_generic(base + 128 * ((stage * kWarps + warp) * kWords + i) + 4 * lane));
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), kDrawers * ptx::kWarpArrivals);
      ptx::mbarrier_init(empty(stage), kWarps * ptx::kWarpArrivals);
    }
  }

  // By a consumer warp: the words of its next tile.
  __device__ __forceinline__ void take(Ring<kStages>& ring, int warp, int lane, uint32_t (&words)[kWords]) const {
    ptx::mbarrier_wait(full(ring.stage), ring.parity);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = word(ring.stage, warp, i, lane);
    ptx::mbarrier_arrive_warp(empty(ring.stage));
    ring.advance();
  }

  // By a drawer: `draw(item)` writes one of the tile's `items` items; the drawers share them.
  template <typename Draw>
  __device__ __forceinline__ void fill(Ring<kStages>& ring, int items, Draw draw) const {
    ptx::mbarrier_wait(empty(ring.stage), ring.parity ^ 1);
    for (int item = threadIdx.x / 32 - 1; item < items; item += kDrawers) draw(item);
    ptx::mbarrier_arrive_warp(full(ring.stage));
    ring.advance();
  }
};

}  // namespace flash_models
