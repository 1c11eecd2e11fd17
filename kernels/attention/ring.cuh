// SPDX-License-Identifier: Apache-2.0
//
// Place in a ring of stages that one side fills and the other empties, with an mbarrier for either event in each stage.
#pragma once

#include <cstdint>

namespace flash_models {

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;  // of the round: what to wait for on a full barrier; on an empty one, its opposite

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

}  // namespace flash_models
