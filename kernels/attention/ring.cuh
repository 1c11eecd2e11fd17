// SPDX-License-Identifier: Apache-2.0
//
// A ring of stages in shared memory that one side fills and the other empties.
#pragma once

#include <cstdint>

#include "hopper/ptx.cuh"

namespace flash_models {

// Where one of the sides is.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;  // of the round: what to wait for on a full barrier; on an empty one, its opposite

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ Ring next() const {
    Ring ring = *this;
    ring.advance();
    return ring;
  }
};

// The mbarriers of the ring: of each stage one for either event, written and read.
template <int kStages>
struct RingBarriers {
  static constexpr int kBytes = 16 * kStages;
  uint32_t base;

  __device__ __forceinline__ uint32_t full(int stage) const { return base + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(kStages + stage); }
  __device__ __forceinline__ uint32_t end() const { return base + kBytes; }

  // By one thread: so many arrivals fill a stage and empty it.
  __device__ __forceinline__ void init(int writers, int readers) const {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), writers);
      ptx::mbarrier_init(empty(stage), readers);
    }
  }

  __device__ __forceinline__ void await_full(const Ring<kStages>& at) const {
    ptx::mbarrier_wait(full(at.stage), at.parity);
  }
  __device__ __forceinline__ bool is_full(const Ring<kStages>& at) const {
    return ptx::mbarrier_test(full(at.stage), at.parity);
  }
  __device__ __forceinline__ void await_empty(const Ring<kStages>& at) const {
    ptx::mbarrier_wait(empty(at.stage), at.parity ^ 1);
  }
  // By a warp that has read its stage.
  __device__ __forceinline__ void release(Ring<kStages>& at) const {
    ptx::mbarrier_arrive_warp(empty(at.stage));
    at.advance();
  }
};

}  // namespace flash_models
