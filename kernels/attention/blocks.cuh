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

// Tiles of [lo, hi) that the list of the block holding `token` names.
__device__ __forceinline__ Tiles tiles_of(const BlockLists& lists, int64_t block_size, int head, int token, int tile,
                                          int lo, int hi) {
  Tiles t;
  t.lo = lo;
  t.hi = max(lo, hi);
  t.count = t.hi - t.lo;
  if (lists.start != nullptr) {
    const int32_t* start = lists.start + head * lists.head_stride + token / static_cast<int>(block_size);
    t.per_block_log2 = 31 - __clz(static_cast<int>(block_size) / tile);
    t.list = lists.index + start[0];
    t.count = t.hi > t.lo ? (start[1] - start[0]) << t.per_block_log2 : 0;
  }
  return t;
}

__device__ __forceinline__ int tiles_in(int tokens, int tile) { return (tokens + tile - 1) / tile; }

// The tile, head and sequence of item `number` of a launch. The tiles of one head run side by side and share what they
// read in L2.
struct Place {
  int tile, head, batch;

  // `from_last`: start with the last tiles, where those have the most work.
  __device__ __forceinline__ Place(const AttentionProblem& p, int number, int tiles, bool from_last) {
    const int line = number % tiles, sequence_head = number / tiles, heads = static_cast<int>(p.heads);
    tile = from_last ? tiles - 1 - line : line;
    head = sequence_head % heads;
    batch = sequence_head / heads;
  }

  // The same for a launch in pairs, items 2 i and 2 i + 1: a tile from the end of a head and one from its start, which
  // under a causal mask have the same work in every pair. The middle one of an odd number is paired with none: `tiles`.
  static __device__ __forceinline__ Place of_pair(const AttentionProblem& p, int number, int tiles) {
    Place place(p, number / 2, (tiles + 1) / 2, false);
    const int mirrored = tiles - 1 - place.tile;
    if (number % 2 == 0) {
      place.tile = mirrored;
    } else if (place.tile == mirrored) {
      place.tile = tiles;
    }
    return place;
  }
};

// The (query, key) pairs of one sequence that attend: lo <= key < hi and key <= query + diagonal.
struct Visible {
  int lo, hi, diagonal;

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
__device__ __forceinline__ Tiles key_tiles(const AttentionProblem& p, const Visible& visible, int head, int q0,
                                           int rows, int tile) {
  const int last = max(0, min(visible.hi, q0 + rows + visible.diagonal));
  return tiles_of(p.rows, p.block_size, head, q0, tile, visible.lo / tile, tiles_in(last, tile));
}

// Query tiles that may see keys [k0, k0 + columns).
__device__ __forceinline__ Tiles query_tiles(const AttentionProblem& p, const Sequence& s, const Visible& visible,
                                             int head, int k0, int columns, int tile) {
  const bool any = k0 < visible.hi && k0 + columns > visible.lo;
  return tiles_of(p.columns, p.block_size, head, k0, tile, max(0, k0 - visible.diagonal) / tile,
                  any ? tiles_in(static_cast<int>(s.q_len), tile) : 0);
}

}  // namespace flash_models
