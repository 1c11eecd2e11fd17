// SPDX-License-Identifier: Apache-2.0
//
// Which tiles a CTA visits: every tile of a range (dense), or those of the range that a block list names. This is the
// only difference between flash and block-sparse attention. Forward: key tiles of a query tile, from the row lists.
// Backward for keys: query tiles of a key tile, from the transposed lists.
#pragma once

#include "sequence.h"

namespace flash_models {

struct Tiles {
  const int32_t* list = nullptr;  // block numbers; nullptr lists the whole range
  int per_block_log2 = 0;         // tiles in a block: 1, 2 or 4
  int lo = 0, hi = 0;             // tile range
  int count = 0;                  // positions to walk

  // Tile at a position. Positions of a list may name tiles outside the range; next() steps over them.
  __device__ __forceinline__ int tile(int position) const {
    return list == nullptr
               ? lo + position
               : (list[position >> per_block_log2] << per_block_log2) + (position & ((1 << per_block_log2) - 1));
  }

  // First position from `position` on that is to be visited, or >= count.
  __device__ __forceinline__ int next(int position) const {
    if (list != nullptr)
      while (position < count && !(tile(position) >= lo && tile(position) < hi)) ++position;
    return position;
  }
};

// A part of a layout's lists: positions [first, last).
struct Piece {
  int first = 0, last = 0;

  // The whole list of the block that holds `token`; nothing where there is no layout.
  static __device__ __forceinline__ Piece of_line(const BlockLists& lists, int64_t block_size, int head, int token) {
    if (lists.start == nullptr) return {};
    const int32_t* start = lists.start + head * lists.head_stride + token / static_cast<int>(block_size);
    return {start[0], start[1]};
  }
};

// Tiles of [lo, hi) that the piece names; all where there is no layout.
__device__ __forceinline__ Tiles tiles_of(const BlockLists& lists, int64_t block_size, const Piece& piece, int tile,
                                          int lo, int hi) {
  Tiles t;
  t.lo = lo;
  t.hi = max(lo, hi);
  t.count = t.hi - t.lo;
  if (lists.start != nullptr) {
    t.per_block_log2 = 31 - __clz(static_cast<int>(block_size) / tile);
    t.list = lists.index + piece.first;
    t.count = t.hi > t.lo ? (piece.last - piece.first) << t.per_block_log2 : 0;
  }
  return t;
}

__device__ __forceinline__ int tiles_in(int tokens, int tile) { return (tokens + tile - 1) / tile; }

// The tile, head and sequence of item `number` of a launch. The tiles of one head run side by side and share what they
// read in L2.
struct Place {
  int tile = -1, head = 0, batch = 0;

  __device__ __forceinline__ Place() {}

  // `from_last`: start with the last tiles, where those have the most work.
  __device__ __forceinline__ Place(const AttentionProblem& p, int number, int tiles, bool from_last)
      : Place(p, from_last ? tiles - 1 - number % tiles : number % tiles, number / tiles) {}

  __device__ __forceinline__ Place(const AttentionProblem& p, int tile, int sequence_head)
      : tile(tile), head(sequence_head % static_cast<int>(p.heads)), batch(sequence_head / static_cast<int>(p.heads)) {}
};

// Item `number` of a launch over the pieces of a layout's lines, which are its tiles. The heads and sequences of a
// piece run side by side, so that the longest pieces of all of them, those of the first lines, come first.
struct ListedWork {
  Place place;  // tile -1: a spare item, without work
  Piece piece;
  int item = 0;       // of WorkItems
  int64_t slot = -1;  // among all partial results; -1: the piece is the whole line

  __device__ __forceinline__ ListedWork() {}

  __device__ __forceinline__ ListedWork(const AttentionProblem& p, const BlockLists& lists, const WorkItems& work,
                                        int64_t lines, int number) {
    const int all = copies(p, lists), copy = number % all, per_head = static_cast<int>(lines);
    item = number / all;
    const int4 found = reinterpret_cast<const int4*>(work.items)[item];
    if (found.x < 0) return;
    place.tile = found.x % per_head;
    place.head = lists.head_stride == 0 ? copy / static_cast<int>(p.batch) : found.x / per_head;
    place.batch = copy % static_cast<int>(p.batch);
    piece = {found.y, found.z};
    if (found.w >= 0) slot = copy * work.max_slots + found.w;
  }

  // Heads and sequences that share the items, with slots of their own.
  static __host__ __device__ __forceinline__ int copies(const AttentionProblem& p, const BlockLists& lists) {
    return static_cast<int>(p.batch * (lists.head_stride == 0 ? p.heads : 1));
  }
  static int64_t count(const AttentionProblem& p, const BlockLists& lists, int64_t items) {
    return items * copies(p, lists);
  }
};

// The (query, key) pairs of one sequence that attend: lo <= key < hi and key <= query + diagonal.
struct Visible {
  int lo = 0, hi = 0, diagonal = 0;

  Visible() = default;
  __device__ __forceinline__ Visible(const AttentionProblem& p, const Sequence& s)
      : lo(static_cast<int>(s.key_lo)),
        hi(static_cast<int>(s.key_hi)),
        diagonal(p.causal ? static_cast<int>(s.k_len - s.q_len) : 1 << 30) {}

  __device__ __forceinline__ bool operator()(int query, int key) const {
    return key >= lo && key < hi && key <= query + diagonal;
  }

  // Whether every pair of queries q0 .. and keys [k0, k0 + columns) attends, so that no element needs the test above.
  __device__ __forceinline__ bool all(int q0, int k0, int columns) const {
    return k0 >= lo && k0 + columns <= hi && k0 + columns - 1 <= q0 + diagonal;
  }
};

// Key tiles that queries [q0, q0 + rows) may see.
__device__ __forceinline__ Tiles key_tiles(const AttentionProblem& p, const Visible& visible, const Piece& piece,
                                           int q0, int rows, int tile) {
  const int last = max(0, min(visible.hi, q0 + rows + visible.diagonal));
  return tiles_of(p.rows, p.block_size, piece, tile, visible.lo / tile, tiles_in(last, tile));
}

// Query tiles that may see keys [k0, k0 + columns).
__device__ __forceinline__ Tiles query_tiles(const AttentionProblem& p, const Sequence& s, const Visible& visible,
                                             const Piece& piece, int k0, int columns, int tile) {
  const bool any = k0 < visible.hi && k0 + columns > visible.lo;
  return tiles_of(p.columns, p.block_size, piece, tile, max(0, k0 - visible.diagonal) / tile,
                  any ? tiles_in(static_cast<int>(s.q_len), tile) : 0);
}

}  // namespace flash_models
