// SPDX-License-Identifier: Apache-2.0
//
// The consumers' turns on Hopper (arXiv 2407.08608, Section 3.1): warpgroup `i` issues its products once `i - 1` has
// issued its own, so that one's softmax runs under the others' products.
#pragma once

#include "hopper/ptx.cuh"

namespace flash_models {

template <int kWarpgroups>
struct Turns {
  int i;

  // The first turn is warpgroup 0's.
  __device__ __forceinline__ explicit Turns(int warpgroup) : i(warpgroup) {
    if (i == kWarpgroups - 1) pass();
  }
  __device__ __forceinline__ void take() const {
    if constexpr (kWarpgroups > 1) ptx::named_barrier_sync(1 + i, 256);
  }
  __device__ __forceinline__ void pass() const {
    if constexpr (kWarpgroups > 1) ptx::named_barrier_arrive(1 + (i + 1) % kWarpgroups, 256);
  }
};

}  // namespace flash_models
