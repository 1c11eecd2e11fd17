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

// Three consumers hide each other's waits best, but leave a thread 160 registers, too few for more head dimensions, and
// the drawers 32. Their tiles of 192 rows must not cut the sequence badly, and they cut short ones along a diagonal
// badly. They take no layouts.
inline bool takes_three_consumers(const AttentionProblem& p) {
  if (padded_dim(p.head_dim) > 64 || p.rng_state != nullptr || p.block_size != 0) return false;
  const int64_t rows_of_three = 192 * ceil_div(p.seqlen_q, 192), rows_of_two = 128 * ceil_div(p.seqlen_q, 128);
  return p.causal ? p.seqlen_q >= 4096 : 7 * rows_of_three <= 8 * rows_of_two;
}

// The last round of tiles, where all have the same work and there are fewer than CTAs: cut along the keys so that every
// CTA has the same (Stream-K, arXiv 2301.03598, Section 4.3). Their steps follow each other, a tile's after another's,
// and CTA i takes [i * share, (i + 1) * share) of them, pieces of one tile or of two.
struct SharedRound {
  static constexpr int kTile = 128, kFewest = 4;  // queries and keys of a tile; steps of a CTA that are worth a start
  int tiles = 0, steps = 0, share = 1;            // tiles; steps of one; steps of a CTA

  SharedRound() = default;
  explicit SharedRound(const AttentionProblem& p) {
    if (p.causal || p.kv_range != nullptr || p.cu_seqlens_q != nullptr || p.block_size != 0 || takes_three_consumers(p))
      return;
    const int64_t ctas = multiprocessors(), left = ceil_div(p.seqlen_q, kTile) * p.heads * p.batch % ctas;
    if (p.seqlen_k < 16 * kTile || 10 * left > 9 * ctas) return;
    tiles = static_cast<int>(left), steps = static_cast<int>(ceil_div(p.seqlen_k, kTile));
    share = static_cast<int>(std::max<int64_t>(kFewest, ceil_div(left * steps, ctas)));
  }

  int ctas() const { return (tiles * steps + share - 1) / share; }
  int64_t warps() const {
    return tiles == 0 ? 0 : (slot(tiles * steps - 1) + 1) * (kTile / 16);
  }  // that leave something

  // Of the piece with step `at` of all.
  __host__ __device__ __forceinline__ int slot(int at) const { return at / share + at / steps; }
  __device__ __forceinline__ CutLine line(int tile) const {
    CutLine found;
    found.first_slot = slot(tile * steps);
    found.pieces = slot(tile * steps + steps - 1) - found.first_slot + 1;
    return found;
  }
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
  int whole;  // tiles of the rounds before the shared one
  SharedRound round;

  // The i-th tile of this CTA, where there are no tickets.
  __device__ __forceinline__ int number(int i) const {
    if (dealt) return deal.number(i);
    const int number = blockIdx.x + i * gridDim.x, piece = i - whole / static_cast<int>(gridDim.x);
    if (round.tiles == 0 || number < whole) return number;
    return piece < 2 ? whole + 2 * blockIdx.x + piece : count;
  }

  // Most work first: the last queries under a causal mask, otherwise the first, the global tokens of many layouts.
  __device__ __forceinline__ ListedWork work(const AttentionProblem& p, int number) const {
    if (p.rows.start != nullptr) return {p, p.rows, p.row_items, query_tiles, p.causal ? count - 1 - number : number};
    ListedWork one;
    if (round.tiles > 0 && number >= whole) return shared_work(p, (number - whole) / 2, (number - whole) % 2);
    one.place = dealt ? deal.place(p, number) : Place(p, number, query_tiles, p.causal);
    return one;
  }

  // Of the shared round, what a CTA takes of one tile or of the tile after it.
  __device__ __forceinline__ ListedWork shared_work(const AttentionProblem& p, int cta, int second) const {
    ListedWork one;
    const int begin = cta * round.share, end = min(begin + round.share, round.tiles * round.steps);
    one.item = begin / round.steps + second;
    const int first = one.item * round.steps;  // the tile's first step
    one.piece = {max(begin - first, 0), min(end - first, round.steps)};
    if (one.piece.first >= one.piece.last) return one;
    one.place = Place(p, whole + one.item, query_tiles, p.causal);
    if (round.line(one.item).pieces > 1) one.slot = round.slot(first + one.piece.first);
    return one;
  }

  // By a warp where there is a layout.
  __device__ __forceinline__ CutLine line(const AttentionProblem& p, const ListedWork& work) const {
    if (p.rows.start != nullptr) return CutLine(p.row_items, work);
    return work.slot < 0 ? CutLine() : round.line(work.item);
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
  const bool by_ticket = Config::kListed && p.rows.start != nullptr;
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
    CutLine line;
    if constexpr (Config::kListed) line = schedule.line(p, work);
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
