// SPDX-License-Identifier: Apache-2.0
//
// What one CTA of fwd_sm90.cu holds: tiles, registers, shared memory and barriers.
#pragma once

#include "blocks.cuh"
#include "draw.cuh"
#include "hopper/tile.cuh"
#include "partial.cuh"

namespace flash_models {

template <int kDim_, int kWarpgroups_, int kTileK_, bool kDropout_, bool kQueryHeld_ = false>
struct ForwardConfig {
  static constexpr bool kDropout = kDropout_;
  static constexpr int kDim = kDim_, kWarpgroups = kWarpgroups_, kTileK = kTileK_;
  static constexpr int kTileQ = 64 * kWarpgroups, kThreads = 128 * (kWarpgroups + 1);
  static constexpr bool kListed = kWarpgroups < 3;  // takes layouts
  static constexpr int kCtasPerSm = kWarpgroups == 1 ? (kDim <= 64 ? 3 : 2) : 1;
  // Of Q, as its place is where out leaves from. A short tile ends before the one after the next could come otherwise.
  static constexpr int kTileStages = kDim <= 64 || (kWarpgroups == 2 && !kDropout) ? 3 : 2;
  static constexpr int kStages = kDim <= 64 ? (kWarpgroups == 1 ? 3 : 4) : 2;
  static constexpr int kPlanned = kWarpgroups == 1 ? 1 : 8;  // tiles ahead; of a layout, one
  // Q in registers for all of its products: shared memory is read a seventh less, which is power, and that bounds long
  // sequences. A short tile would wait for the way there.
  static constexpr bool kQueryHeld = kQueryHeld_;
  // Two consumers left to themselves end up side by side: both exponentiate while the tensor cores wait. Where that
  // takes as long as the products, a consumer passes its turn only before its exponentials, so that the other's
  // products run under them. The drawers of dropout fill such gaps, so they may be.
  static constexpr bool kPassesLate = kWarpgroups == 2 && kDim <= 64 && !kDropout;
  // Whether it asks before its exponentials if the next keys and values are here, or waits for them under its products.
  static constexpr bool kAsks = kWarpgroups == 2 && (!kDropout || kStages == 2);
  static constexpr int kProducerRegisters = kQueryHeld         ? 56
                                            : kWarpgroups == 3 ? 32
                                            : kWarpgroups == 2 ? 88
                                            : kCtasPerSm == 3  ? 40
                                                               : 72;
  static constexpr int kConsumerRegisters = kQueryHeld         ? 224
                                            : kWarpgroups == 3 ? 160
                                            : kWarpgroups == 2 ? 208
                                            : kCtasPerSm == 3  ? 120
                                                               : 184;
  static_assert(registers_suffice(kCtasPerSm, kWarpgroups, kProducerRegisters, kConsumerRegisters));
};

// What the planner tells of a tile of queries: all that producer and consumers would else have to find out of the
// problem between two tiles.
struct QueryNote : TileNote {
  Visible visible;
  int rows;          // of the sequence, from the tile's first one on
  int row, key;      // the tile's first row and the sequence's first key, in the tensors
  int position;      // the first one to walk
  CutLine line;      // of which the tile is a piece, where it has a slot
  int64_t out, lse;  // where the first row is written
  Tiles walk;
};

//   Q [kTileStages][kTileQ x kDim] | K [kStages][kTileK x kDim] | V [kStages][kTileK x kDim] | bits of dropout |
//   barriers | notes | notes of what is planned [kPlanned]
template <typename T, typename Config>
struct ForwardShared {
  static constexpr int kTileStages = Config::kTileStages, kStages = Config::kStages;
  using Query = PanelTile<T, Config::kTileQ, Config::kDim>;
  using Key = PanelTile<T, Config::kTileK, Config::kDim>;
  using Rows = PanelTile<T, 16, Config::kDim>;  // of out, as a warp writes them
  using Kept = KeptBits<4 * Config::kWarpgroups, 4 * Config::kWarpgroups, Config::kTileK / 64, 2>;
  static constexpr int kKept = kTileStages * Query::kBytes + 2 * kStages * Key::kBytes;
  static constexpr int kBarriers = kKept + (Config::kDropout ? Kept::kBytes : 0);
  using TileRing = RingBarriers<kTileStages>;  // full: the note of the tile is there, its Q by q_full
  using KeyRing = RingBarriers<kStages>;
  static constexpr int kRings = TileRing::kBytes + 2 * KeyRing::kBytes + Kept::Barriers::kBytes;
  static constexpr int kNotes = (kBarriers + 16 + 8 * kTileStages + kRings + 15) / 16 * 16;
  using TileNotes = Notes<kTileStages, kStages, QueryNote>;
  static constexpr int kPlans = (kNotes + TileNotes::kBytes + 15) / 16 * 16;
  static constexpr int kBytes = kPlans + Config::kPlanned * static_cast<int>(sizeof(QueryNote));
  static_assert(kBytes <= shared_bytes(Config::kCtasPerSm));
  uint32_t base;

  __device__ __forceinline__ Query q(int stage) const { return {base + stage * Query::kBytes}; }
  __device__ __forceinline__ Key k(int stage) const {
    return {base + kTileStages * Query::kBytes + stage * Key::kBytes};
  }
  __device__ __forceinline__ Key v(int stage) const { return k(kStages + stage); }

  __device__ __forceinline__ uint32_t raw() const { return base + kBarriers; }
  __device__ __forceinline__ uint32_t wanted() const { return raw() + 8; }  // the producer will soon want the next note
  __device__ __forceinline__ uint32_t q_full(int stage) const { return raw() + 16 + 8 * stage; }
  __device__ __forceinline__ TileRing tile_ring() const { return {q_full(kTileStages)}; }
  __device__ __forceinline__ KeyRing k_ring() const { return {tile_ring().end()}; }
  __device__ __forceinline__ KeyRing v_ring() const { return {k_ring().end()}; }
  __device__ __forceinline__ Kept kept() const { return {base + kKept, {v_ring().end()}}; }

  __device__ __forceinline__ TileNotes notes() const { return {base + kNotes}; }
  __device__ __forceinline__ QueryNote& planned(int i) const {
    return static_cast<QueryNote*>(__cvta_shared_to_generic(base + kPlans))[i];
  }

  __device__ __forceinline__ void init_barriers() const {
    constexpr int kReaders = 4 * Config::kWarpgroups * ptx::kWarpArrivals;
    constexpr int kNoteReaders =
        kReaders + (Config::kDropout ? kFollowers * ptx::kWarpArrivals : 0);  // of tiles and keys
    ptx::mbarrier_init(raw(), 1);
    ptx::mbarrier_init(wanted(), 1);
    for (int stage = 0; stage < kTileStages; ++stage) ptx::mbarrier_init(q_full(stage), 1);
    tile_ring().init(1, kNoteReaders);
    k_ring().init(1, kNoteReaders);
    v_ring().init(1, kReaders);
    kept().init_barriers();
    ptx::mbarrier_init_fence();
  }
};

}  // namespace flash_models
