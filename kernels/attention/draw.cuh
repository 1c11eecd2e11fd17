// SPDX-License-Identifier: Apache-2.0
//
// Who draws for dropout on Hopper: the four warps of the producer's warpgroup, one on each scheduler of the SM. The
// producer draws its share when it has sent for a tile; the three others follow the notes as the consumers do. They
// decide a tile ahead what is kept and hand it over through shared memory, a bit an element. So a consumer's chain of
// products and exponentials is hardly longer than without dropout.
#pragma once

#include "dropout.cuh"
#include "hopper/ptx.cuh"
#include "ring.cuh"
#include "tickets.cuh"

namespace flash_models {

constexpr int kDrawers = 4, kFollowers = kDrawers - 1;  // all but the producer follow the notes

// The bits in shared memory: kWords words a lane for each of kGroups groups of rows, in kStages stages; kReaders
// consumer warps read them.
template <int kReaders, int kGroups, int kWords, int kStages>
struct KeptBits {
  using Barriers = RingBarriers<kStages>;
  static constexpr int kBytes = kStages * kGroups * kWords * 128;
  uint32_t base;
  Barriers barriers;

  __device__ __forceinline__ uint32_t& word(int stage, int group, int i, int lane) const {
    const int at = ((stage * kGroups + group) * kWords + i) * 128 + 4 * lane;
    return *static_cast<uint32_t*>(__cvta_shared_to_generic(base + at));
  }

  __device__ __forceinline__ void init_barriers() const {
    barriers.init(kDrawers * ptx::kWarpArrivals, kReaders * ptx::kWarpArrivals);
  }

  // By a consumer warp: the words of its next tile.
  __device__ __forceinline__ void take(Ring<kStages>& ring, int group, int lane, uint32_t (&words)[kWords]) const {
    barriers.await_full(ring);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = word(ring.stage, group, i, lane);
    barriers.release(ring);
  }

  // By a drawer: `draw(row, column)` writes one of the tile's kRows x kColumns parts. The drawers share them in blocks
  // of neighbouring rows: calls of Philox for the same rows or columns have their first rounds in common, and side by
  // side they hide that each is one chain of dependent instructions.
  template <int kRows, int kColumns, typename Draw>
  __device__ __forceinline__ void fill(Ring<kStages>& ring, Draw draw) const {
    constexpr int kShare = kRows * kColumns / kDrawers, kBlock = kShare > 0 ? kShare : 1;  // rows
    static_assert(kRows % kBlock == 0);
    barriers.await_empty(ring);
    for (int block = threadIdx.x % 128 / 32; block < kRows * kColumns / kBlock; block += kDrawers) {
      const int first = block / kColumns * kBlock;
#pragma unroll
      for (int i = 0; i < kBlock; ++i) draw(first + i, block % kColumns);
    }
    ptx::mbarrier_arrive_warp(barriers.full(ring.stage));
    ring.advance();
  }
};

// The notes from first to last, by a follower: `visit(dropout, tile, first)` with the draws of the head, the number of
// the tile and the first token of what passes by. The rings are those of the tiles and of what passes by.
template <int kTiles, int kStages, typename Note, typename Visit>
__device__ __forceinline__ void follow_notes(const AttentionProblem& p, const Notes<kTiles, kStages, Note>& notes,
                                             const RingBarriers<kTiles>& tile_ring,
                                             const RingBarriers<kStages>& step_ring, Visit visit) {
  Ring<kTiles> tiles;
  Ring<kStages> steps;
  while (true) {
    tile_ring.await_full(tiles);
    const TileNote note = notes.tile(tiles.stage);
    if (note.last()) return;
    tile_ring.release(tiles);
    const Dropout dropout(p, note.batch * p.heads + note.head);
    for (bool more = note.walks(); more;) {
      step_ring.await_full(steps);
      const Step step = notes.step(steps.stage);
      step_ring.release(steps);
      more = !step.last();
      visit(dropout, note.tile, step.first());
    }
  }
}

}  // namespace flash_models
