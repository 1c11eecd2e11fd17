// SPDX-License-Identifier: Apache-2.0
//
// Which tiles of queries a CTA of fwd_sm90.cu takes, and what its other warps are told of each.
#pragma once

#include "fwd_shared_sm90.cuh"

namespace flash_models {

// The list of query tiles, and which of them a CTA takes. CTAs that stay save their start and hide their ends. Where
// the work of one CTA is much like that of every other, which under a causal mask pairs of tiles see to, and in a
// padded batch that a CTA's tiles lie in all its sequences, each takes its share; the pieces of a layout go to whoever
// asks next, and that is late, when the last keys of a CTA's tile are sent for: what one takes early the others lack in
// the end. Packed sequences go through the hardware's queue, a CTA each.
struct Schedule {
  int query_tiles, count;
  bool pairs;
  int32_t* ticket;

  // The i-th tile of this CTA, where there are no tickets.
  __device__ __forceinline__ int number(int i) const {
    return ((blockIdx.x + (i >> pairs) * gridDim.x) << pairs) + (i & pairs);
  }

  // Most work first: the last queries under a causal mask, otherwise the first, the global tokens of many layouts.
  __device__ __forceinline__ ListedWork work(const AttentionProblem& p, int number) const {
    if (p.rows.start != nullptr) return {p, p.rows, p.row_items, query_tiles, p.causal ? count - 1 - number : number};
    ListedWork whole;
    whole.place = pairs ? Place::of_pair(p, number, query_tiles) : Place(p, number, query_tiles, p.causal);
    return whole;
  }
};

// Finds out what comes next and writes the notes of it, a tile ahead of all others. Most of that is waiting for one
// number after the other, so a lane each does it for several tiles at once.
template <typename T, typename Config>
struct Planner {
  const AttentionProblem& p;
  const Schedule& schedule;
  const ForwardShared<T, Config> shared{ptx::swizzled_shared()};
  const int lane = threadIdx.x % 32;
  unsigned ready = 0;  // the lanes whose tile has yet to be told of
  int round = 0;
  bool more = true;
  Ring<Config::kTileStages> tiles;
  Ring<1> wanted;

  // The note of one tile; false when it says that none is left.
  __device__ __forceinline__ bool operator()() {
    if (schedule.ticket != nullptr && round > 0) {
      ptx::mbarrier_wait(shared.wanted(), wanted.parity);
      wanted.advance();
    }
    while (ready == 0 && more) look_ahead();
    const int next = more ? __ffs(static_cast<int>(ready)) - 1 : 0;
    ready &= ready - 1;
    shared.tile_ring().await_empty(tiles);
    if (lane == next) {
      QueryNote& note = shared.notes().tile(tiles.stage);
      if (more) {
        note = shared.planned(lane);
      } else {
        note.end();
      }
      ptx::mbarrier_arrive(shared.tile_ring().full(tiles.stage));
    }
    tiles.advance();
    return more;
  }

 private:
  // The next tiles of this CTA, or one by ticket.
  __device__ __forceinline__ void look_ahead() {
    const bool alone = schedule.ticket != nullptr;
    const int number = alone ? take_ticket(schedule.ticket) : schedule.number(Config::kPlanned * round + lane);
    const bool valid = number < schedule.count && lane < (alone ? 1 : Config::kPlanned);
    bool found = false;
    ++round;
    if (valid) {
      const ListedWork work = schedule.work(p, number);
      const Place place = work.place;
      const Sequence s = sequence_of(p, place.batch);
      const int q0 = place.tile * Config::kTileQ;
      if (place.tile >= 0 && q0 < s.q_len) {
        QueryNote note;
        note.visible = Visible(p, s);
        note.walk = key_tiles(p, note.visible, work.piece, q0, Config::kTileQ, Config::kTileK);
        note.position = note.walk.next(0);
        note.tile = place.tile, note.head = place.head, note.batch = place.batch;
        note.slot_and_work = 2 * static_cast<int>(work.slot) + (note.position < note.walk.count);
        note.rows = static_cast<int>(s.q_len) - q0;
        note.row = static_cast<int>(s.q_begin) + q0;
        note.key = static_cast<int>(s.k_begin);
        note.out = query_offset(p.out, s, place.batch, place.head) + q0 * p.out.seq;
        note.lse = lse_offset(p, s, place.batch, place.head) + q0;
        shared.planned(lane) = note;
        found = true;
      }
    }
    ready = __ballot_sync(~0u, found);
    more = __any_sync(~0u, valid);
  }
};

}  // namespace flash_models
