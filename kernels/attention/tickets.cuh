// SPDX-License-Identifier: Apache-2.0
//
// How the CTAs of a Hopper kernel share work items: one warp takes the next number and tells the others of its CTA,
// through shared memory, which tile of which head it is.
#pragma once

#include <cstdint>

namespace flash_models {

// By a warp.
__device__ __forceinline__ int take_ticket(int32_t* ticket) {
  int number = 0;
  if (threadIdx.x % 32 == 0) number = atomicAdd(ticket, 1);
  return __shfl_sync(~0u, number, 0);
}

// What the producer tells of a tile. Nothing follows a tile -1.
struct alignas(16) TileNote {
  int tile, head, batch, slot_and_work;  // 2 * slot of a partial result, or -2; plus 1 if there are tiles to walk

  __device__ __forceinline__ void end() { tile = -1, slot_and_work = 0; }
  __device__ __forceinline__ bool last() const { return tile < 0; }
  __device__ __forceinline__ bool walks() const { return slot_and_work % 2 != 0; }
  __device__ __forceinline__ int slot() const { return slot_and_work >> 1; }
};

// Of a tile that passes by: its first token, a multiple of 32, and in the bits below what else is to be known.
struct Step {
  static constexpr int kLast = 1, kMasked = 2;  // the last one to walk; not all its pairs attend (backward)
  int word = 0;

  static __device__ __forceinline__ Step of(int first, bool last, bool masked = false) {
    return {first + last * kLast + masked * kMasked};
  }
  __device__ __forceinline__ int first() const { return word & ~(kLast | kMasked); }
  __device__ __forceinline__ bool last() const { return word & kLast; }
  __device__ __forceinline__ bool masked() const { return word & kMasked; }
};

// In shared memory: the notes of kTiles tiles, and what passes by in each of kStages stages.
template <int kTiles, int kStages, typename Note = TileNote>
struct Notes {
  static constexpr int kBytes = kTiles * sizeof(Note) + kStages * sizeof(Step);
  uint32_t base;  // a multiple of 16

  __device__ __forceinline__ Note& tile(int stage) const {
    return static_cast<Note*>(__cvta_shared_to_generic(base))[stage];
  }
  __device__ __forceinline__ Step& step(int stage) const { return reinterpret_cast<Step*>(&tile(kTiles))[stage]; }
};

}  // namespace flash_models
