// SPDX-License-Identifier: Apache-2.0
//
// What one CTA of bwd_sm90.cu holds: tiles, registers, shared memory and barriers.
#pragma once

#include "blocks.cuh"
#include "draw.cuh"
#include "hopper/tile.cuh"
#include "partial.cuh"

namespace flash_models {

template <int kDim_, int kWarpgroups_, int kTileQ_, bool kDropout_>
struct BackwardConfig {
  static constexpr bool kDropout = kDropout_;
  static constexpr int kDim = kDim_, kWarpgroups = kWarpgroups_, kTileQ = kTileQ_, kTileK = 64 * kWarpgroups;
  static constexpr int kStages = 2, kThreads = 128 * (kWarpgroups + 1);  // no other: dQ is a step behind
  static constexpr int kKeptStages = kDim <= 64 ? 2 : 1;
  static constexpr int kCtasPerSm = kWarpgroups == 1 ? 2 : 1;
  static constexpr bool kDqFirst = kTileQ < kTileK;                 // of a step's products; else dV
  static constexpr int kTurns = kTileQ < kTileK ? kWarpgroups : 1;  // turns.cuh; 1: none
  // A warpgroup's share of dQ: 64 of a tile's queries, or, where a tile has only 64, some of the columns.
  static constexpr int kDqDim = kTileQ == kTileK ? kDim : kDim / kWarpgroups;
  static constexpr int kProducerRegisters = kWarpgroups == 2 && !kDropout ? 40 : 56;
  static constexpr int kConsumerRegisters = kWarpgroups == 1 ? 200 : kDropout ? 224 : 232;
  static_assert(registers_suffice(kCtasPerSm, kWarpgroups, kProducerRegisters, kConsumerRegisters));
};

// What the producer tells of a tile of keys: all that consumers would else have to find out of the problem.
struct KeyNote : TileNote {
  Visible visible;
  int q_len;
  int rows, key;    // of the sequence, from the tile's first key on; that key's place in the tensors
  int64_t dq_tile;  // where the sequence's dQ begins, in tiles of 64 rows
  CutLine line;     // of which the tile is a piece, where it has a slot
};

//   K [2] | V [kTileK x kDim] | Q | dO [kStages][kTileQ x kDim] | dS^T [2][kTileK x kTileQ] | values of rows
//   [kStages][kTileQ] | dQ of each warp [16 x kDqDim] | bits of dropout | barriers | notes
//
// The next tile's K comes during this one, its V once the last dP^T of this one has been computed. The values of rows
// do not come last: a product reads those of `starts` twice, and compute-sanitizer takes them for twice as long.
template <typename T, typename Config>
struct BackwardShared {
  static constexpr int kStages = Config::kStages, kTileQ = Config::kTileQ, kWarps = 4 * Config::kWarpgroups;
  using Key = PanelTile<T, Config::kTileK, Config::kDim>;
  using Query = PanelTile<T, kTileQ, Config::kDim>;
  using Scores = PanelTile<T, Config::kTileK, kTileQ>;
  using Kept = KeptBits<kWarps, Config::kTileK / 32, kTileQ / 32, Config::kKeptStages>;
  using StartTile = NarrowTile<kTileQ>;
  static constexpr int kRowsBytes =
      Config::kDropout ? 2 * 4 * kTileQ : StartTile::kBytes;  // shift, delta; or starts.cuh's
  static constexpr int kQueries = 3 * Key::kBytes, kScores = kQueries + 2 * kStages * Query::kBytes;
  static constexpr int kRows = kScores + 2 * Scores::kBytes, kDq = kRows + kStages * kRowsBytes;
  static constexpr int kWarpDqBytes = 16 * Config::kDqDim * 4, kKept = kDq + kWarps * kWarpDqBytes;
  static constexpr int kBarriers = kKept + (Config::kDropout ? Kept::kBytes : 0);
  using KeyRing = RingBarriers<2>;
  using ValueRing = RingBarriers<1>;
  using QueryRing = RingBarriers<kStages>;
  static constexpr int kRings = KeyRing::kBytes + ValueRing::kBytes + 3 * QueryRing::kBytes + Kept::Barriers::kBytes;
  static constexpr int kNotes = (kBarriers + 8 + kRings + 15) / 16 * 16;
  static constexpr int kBytes = kNotes + Notes<2, kStages, KeyNote>::kBytes;
  static_assert(kBytes <= shared_bytes(Config::kCtasPerSm));
  uint32_t base;

  __device__ __forceinline__ Key k(int stage) const { return {base + stage * Key::kBytes}; }
  __device__ __forceinline__ Key v() const { return k(2); }
  __device__ __forceinline__ Query q(int stage) const { return {base + kQueries + stage * Query::kBytes}; }
  __device__ __forceinline__ Query dout(int stage) const { return q(kStages + stage); }
  __device__ __forceinline__ Scores ds(int buffer) const { return {base + kScores + buffer * Scores::kBytes}; }
  __device__ __forceinline__ uint32_t dq(int warp) const { return base + kDq + warp * kWarpDqBytes; }
  __device__ __forceinline__ uint32_t shift(int stage) const { return base + kRows + stage * kRowsBytes; }
  __device__ __forceinline__ uint32_t delta(int stage) const { return shift(stage) + 4 * kTileQ; }
  __device__ __forceinline__ StartTile starts(int stage) const { return {base + kRows + stage * kRowsBytes}; }

  __device__ __forceinline__ uint32_t raw() const { return base + kBarriers; }
  __device__ __forceinline__ QueryRing ds_ring() const { return {raw() + 8}; }
  __device__ __forceinline__ KeyRing k_ring() const { return {ds_ring().end()}; }
  __device__ __forceinline__ ValueRing v_ring() const { return {k_ring().end()}; }
  __device__ __forceinline__ QueryRing q_ring() const { return {v_ring().end()}; }
  __device__ __forceinline__ QueryRing dout_ring() const { return {q_ring().end()}; }
  __device__ __forceinline__ Kept kept() const { return {base + kKept, {dout_ring().end()}}; }

  __device__ __forceinline__ Notes<2, kStages, KeyNote> notes() const { return {base + kNotes}; }

  __device__ __forceinline__ void init_barriers() const {
    constexpr int kReaders = kWarps * ptx::kWarpArrivals;
    constexpr int kNoteReaders = kReaders + (Config::kDropout ? kFollowers * ptx::kWarpArrivals : 0);  // of K's and Q's
    ptx::mbarrier_init(raw(), 1);
    ds_ring().init(kReaders, kReaders);
    k_ring().init(1, kNoteReaders);
    v_ring().init(1, kReaders);
    q_ring().init(2, kNoteReaders);  // Q; values of rows
    dout_ring().init(1, kReaders);
    kept().init_barriers();
    ptx::mbarrier_init_fence();
  }
};

}  // namespace flash_models
