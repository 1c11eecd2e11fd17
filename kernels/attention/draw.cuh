// SPDX-License-Identifier: Apache-2.0
//
// Who draws for dropout on Hopper: the three warps of the producer's warpgroup that copy nothing. They follow the
// producer's notes as the consumers do, decide a tile ahead what is kept, and hand it over through shared memory, a bit
// an element. So a consumer's chain of products and exponentials is hardly longer than without dropout.
#pragma once

#include "dropout.cuh"
#include "hopper/ptx.cuh"
#include "ring.cuh"

namespace flash_models {

constexpr int kDrawers = 3;  // warps 1 .. 3 of the producer's warpgroup

// The bits in shared memory: kWords words a lane for each of kGroups groups of rows, in kStages stages; kReaders
// consumer warps read them.
template <int kReaders, int kGroups, int kWords, int kStages>
struct KeptBits {
  static constexpr int kBytes = kStages * kGroups * kWords * 128, kBarriers = 2 * kStages;
  uint32_t base, barriers;

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(kStages + stage); }
  __device__ __forceinline__ uint32_t& word(int stage, int group, int i, int lane) const {
    const int at = ((stage * kGroups + group) * kWords + i) * 128 + 4 * lane;
    return *static_cast<uint32_t*>(__cvta_shared_to_generic(base + at));
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), kDrawers * ptx::kWarpArrivals);
      ptx::mbarrier_init(empty(stage), kReaders * ptx::kWarpArrivals);
    }
  }

  // By a consumer warp: the words of its next tile.
  __device__ __forceinline__ void take(Ring<kStages>& ring, int group, int lane, uint32_t (&words)[kWords]) const {
    ptx::mbarrier_wait(full(ring.stage), ring.parity);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = word(ring.stage, group, i, lane);
    ptx::mbarrier_arrive_warp(empty(ring.stage));
    ring.advance();
  }

  // By a drawer: `draw(item)` writes one of the tile's `items` items; the drawers share them. An item is two patches,
  // or four calls of Philox side by side: each alone is one chain of dependent instructions.
  template <typename Draw>
  __device__ __forceinline__ void fill(Ring<kStages>& ring, int items, Draw draw) const {
    ptx::mbarrier_wait(empty(ring.stage), ring.parity ^ 1);
    for (int item = threadIdx.x % 128 / 32 - 1; item < items; item += kDrawers) draw(item);
    ptx::mbarrier_arrive_warp(full(ring.stage));
    ring.advance();
  }
};

}  // namespace flash_models
