// SPDX-License-Identifier: Apache-2.0
//
// Which tiles of queries a CTA of fwd_sm90.cu takes, and what its other warps are told of each.
#pragma once

#include <algorithm>

#include "fwd_shared_sm90.cuh"

namespace flash_models {

// The tiles of queries under a causal mask, where the last ones have the most work, as CTAs that stay share them. First
// so many rounds of pairs, a tile from the end of a head and one from its start, which have the same work in every
// pair, and side by side what a head reads. What is left, one to two rounds, is dealt by size: longest first, and every
// second time around in the opposite direction, so that all end together.
struct CausalDeal {
  int tiles, heads, ctas, rounds;  // tiles of a head; heads of all sequences

  CausalDeal() = default;
  CausalDeal(int64_t tiles, int64_t heads, int64_t at_once)
      : tiles(static_cast<int>(tiles)),
        heads(static_cast<int>(heads)),
        ctas(static_cast<int>(std::min(tiles * heads, at_once))),
        rounds(ctas == 0 ? 0 : static_cast<int>(std::max<int64_t>(0, pairs_of_head() * heads / ctas - 1))) {}

  __host__ __device__ __forceinline__ int pairs_of_head() const { return (tiles + 1) / 2; }
  // Numbers of tiles; the middle one of an odd number has two, of which one is none.
  __host__ __device__ __forceinline__ int in_pairs() const { return 2 * rounds * ctas; }
  __host__ __device__ __forceinline__ int count() const { return in_pairs() + tiles * heads - dealt_in_pairs(); }

  // The i-th of this CTA.
  __device__ __forceinline__ int number(int i) const {
    const int cta = blockIdx.x, round = i - 2 * rounds;
    if (round < 0) return 2 * (cta + i / 2 * ctas) + i % 2;
    return in_pairs() + round * ctas + (round % 2 == 0 ? cta : ctas - 1 - cta);
  }

  __device__ __forceinline__ Place place(const AttentionProblem& p, int number) const {
    if (number < in_pairs()) {
      const int near_end = number / 2 % pairs_of_head(), mirrored = tiles - 1 - near_end;
      const int second = near_end == mirrored ? -1 : near_end;
      return Place(p, number % 2 == 0 ? mirrored : second, number / 2 / pairs_of_head());
    }
    // Of the first head the outermost pairs are gone, so in the middle it has a tile of every size as the others do.
    const int first = first_head(), gone = pairs_gone(), others = heads - first - (gone > 0), all = heads - first;
    int left = number - in_pairs();
    if (left < gone * others) return Place(p, tiles - 1 - left / others, heads - others + left % others);
    left -= gone * others;
    if (left < (tiles - 2 * gone) * all) return Place(p, tiles - 1 - gone - left / all, first + left % all);
    left -= (tiles - 2 * gone) * all;
    return Place(p, gone - 1 - left / others, heads - others + left % others);
  }

 private:
  __host__ __device__ __forceinline__ int first_head() const { return rounds * ctas / pairs_of_head(); }
  __host__ __device__ __forceinline__ int pairs_gone() const { return rounds * ctas % pairs_of_head(); }
  __host__ __device__ __forceinline__ int dealt_in_pairs() const { return first_head() * tiles + 2 * pairs_gone(); }
};

// The list of query tiles, and which of them a CTA takes. CTAs that stay save their start and hide their ends. Where
// the work of one CTA is much like that of every other, as in a padded batch, since a CTA's tiles lie in all its
// sequences, each takes its share; the pieces of a layout go to whoever asks next, and that is late, when the last keys
// of a CTA's tile are sent for: what one takes early the others lack in the end. Packed sequences go through the
// hardware's queue, a CTA each.
struct Schedule {
  int query_tiles, count;
  CausalDeal deal;
  bool dealt;

  // The i-th tile of this CTA, where there are no tickets.
  __device__ __forceinline__ int number(int i) const { return dealt ? deal.number(i) : blockIdx.x + i * gridDim.x; }

  // Most work first: the last queries under a causal mask, otherwise the first, the global tokens of many layouts.
  __device__ __forceinline__ ListedWork work(const AttentionProblem& p, int number) const {
    if (p.rows.start != nullptr) return {p, p.rows, p.row_items, query_tiles, p.causal ? count - 1 - number : number};
    ListedWork whole;
    whole.place = dealt ? deal.place(p, number) : Place(p, number, query_tiles, p.causal);
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
  const bool by_ticket = Config::kListed && p.ticket != nullptr;
  unsigned ready = 0;  // the lanes whose tile has yet to be told of
  int round = 0;
  bool more = true;
  Ring<Config::kTileStages> tiles;
  Ring<1> wanted;

  // The note of one tile; false when it says that none is left.
  __device__ __forceinline__ bool operator()() {
    if (by_ticket && round > 0) {
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
    int number = schedule.number(Config::kPlanned * round + lane);
    if (by_ticket && round == 0) number = blockIdx.x;  // while the kernel before sets the tickets to 0
    if (by_ticket && round > 0) {
      ptx::await_previous_kernel();
      number = gridDim.x + take_ticket(p.ticket);
    }
    const bool valid = number < schedule.count && (by_ticket || lane < Config::kPlanned);
    bool found = false;
    ++round;
    ListedWork work;
    if (valid) work = schedule.work(p, number);
    const CutLine line = by_ticket ? CutLine(p.row_items, work) : CutLine();
    if (valid && (!by_ticket || lane == 0)) {
      const Place place = work.place;
      const Sequence s = sequence_of(p, place.batch);
      const int q0 = place.tile * Config::kTileQ;
      if (place.tile >= 0 && q0 < s.q_len) {
        QueryNote note;
        note.visible = Visible(p, s);
        note.walk = key_tiles(p, note.visible, work.piece, q0, Config::kTileQ, Config::kTileK);
        note.position = note.walk.next(0);
        note.line = line;
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
