// SPDX-License-Identifier: Apache-2.0
//
// Who draws for dropout on Hopper: the four warps of the producer's warpgroup, one on each scheduler of the SM. The
// producer draws its share when it has sent for a tile; the three others follow its notes as the consumers do. They
// decide a tile ahead what is kept and hand it over through shared memory, a bit an element. So a consumer's chain of
// products and exponentials is hardly longer than without dropout.
#pragma once

#include "dropout.cuh"
#include "hopper/ptx.cuh"
#include "ring.cuh"
#include "tickets.cuh"

namespace flash_models {

constexpr int kDrawers = 4, kFollowers = kDrawers - 1;  // all but the producer follow its notes

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

  // By a drawer: `draw(item)` writes one of the tile's `items` items; the drawers share them. An item is a block of
  // patches: calls of Philox for the same rows or columns have their first rounds in common, and side by side they hide
  // that each is one chain of dependent instructions.
  template <typename Draw>
  __device__ __forceinline__ void fill(Ring<kStages>& ring, int items, Draw draw) const {
    ptx::mbarrier_wait(empty(ring.stage), ring.parity ^ 1);
    for (int item = threadIdx.x % 128 / 32; item < items; item += kDrawers) draw(item);
    ptx::mbarrier_arrive_warp(full(ring.stage));
    ring.advance();
  }
};

// The producer's notes from first to last, by a follower: `visit(dropout, tile, first)` with the draws of the head, the
// number of the tile and the first token of what passes by, plus 1 at the last. Of each barrier the address of stage
// 0's: tile_full and tile_empty guard the notes of tiles, step_full and step_empty those of what passes by.
template <int kStages, typename Visit>
__device__ __forceinline__ void follow_notes(const AttentionProblem& p, const Notes<kStages>& notes, uint32_t tile_full,
                                             uint32_t tile_empty, uint32_t step_full, uint32_t step_empty,
                                             Visit visit) {
  Ring<2> tiles;
  Ring<kStages> steps;
  while (true) {
    ptx::mbarrier_wait(tile_full + 8 * tiles.stage, tiles.parity);
    const TileNote note = notes.tile(tiles.stage);
    if (note.last()) return;
    ptx::mbarrier_arrive_warp(tile_empty + 8 * tiles.stage);
    tiles.advance();
    const Dropout dropout(p, note.batch * p.heads + note.head);
    for (bool more = note.walks(); more;) {
      ptx::mbarrier_wait(step_full + 8 * steps.stage, steps.parity);
      const int first = notes.first(steps.stage);
      ptx::mbarrier_arrive_warp(step_empty + 8 * steps.stage);
      steps.advance();
      more = first % 2 == 0;
      visit(dropout, note.tile, first);
    }
  }
}

}  // namespace flash_models
