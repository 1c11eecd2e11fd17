// SPDX-License-Identifier: Apache-2.0
//
// What one CTA of fwd_sm90.cu holds: tiles, registers, shared memory and barriers.
#pragma once

#include "draw.cuh"
#include "hopper/tile.cuh"

namespace flash_models {

template <int kDim_, int kWarpgroups_, int kTileK_, bool kDropout_>
struct ForwardConfig {
  static constexpr bool kDropout = kDropout_;
  static constexpr int kDim = kDim_, kWarpgroups = kWarpgroups_, kTileK = kTileK_;
  static constexpr int kTileQ = 64 * kWarpgroups, kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kCtasPerSm = kWarpgroups == 1 ? (kDim <= 64 ? 3 : 2) : 1;
  static constexpr int kStages = kDim <= 64 ? (kWarpgroups == 1 ? 3 : 4) : 2;
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : kWarpgroups == 2 ? 88 : kCtasPerSm == 3 ? 40 : 72;
  static constexpr int kConsumerRegisters = kWarpgroups == 3   ? 160
                                            : kWarpgroups == 2 ? 208
                                            : kCtasPerSm == 3  ? 120
                                                               : 184;
  static_assert(registers_suffice(kCtasPerSm, kWarpgroups, kProducerRegisters, kConsumerRegisters));
};

//   Q [2][kTileQ x kDim] | K [kStages][kTileK x kDim] | V [kStages][kTileK x kDim] | bits of dropout | barriers | notes
template <typename T, typename Config>
struct ForwardShared {
  static constexpr int kStages = Config::kStages;
  using Query = PanelTile<T, Config::kTileQ, Config::kDim>;
  using Key = PanelTile<T, Config::kTileK, Config::kDim>;
  using Kept = KeptBits<4 * Config::kWarpgroups, 4 * Config::kWarpgroups, Config::kTileK / 64, 2>;
  static constexpr int kKept = 2 * Query::kBytes + 2 * kStages * Key::kBytes, kBarriers = kKept + Kept::kBytes;
  static constexpr int kNotes = (kBarriers + 8 * (5 + 4 * kStages + Kept::kBarriers) + 15) / 16 * 16;
  static constexpr int kBytes = kNotes + Notes<kStages>::kBytes;
  uint32_t base;

  __device__ __forceinline__ Query q(int stage) const { return {base + stage * Query::kBytes}; }
  __device__ __forceinline__ Key k(int stage) const { return {base + 2 * Query::kBytes + stage * Key::kBytes}; }
  __device__ __forceinline__ Key v(int stage) const { return k(kStages + stage); }

  __device__ __forceinline__ uint32_t raw() const { return base + kBarriers; }
  __device__ __forceinline__ uint32_t q_full(int stage) const { return base + kBarriers + 8 + 8 * stage; }
  __device__ __forceinline__ uint32_t q_empty(int stage) const { return q_full(2 + stage); }
  __device__ __forceinline__ uint32_t k_full(int stage) const { return q_full(4 + stage); }
  __device__ __forceinline__ uint32_t k_empty(int stage) const { return k_full(kStages + stage); }
  __device__ __forceinline__ uint32_t v_full(int stage) const { return k_full(2 * kStages + stage); }
  __device__ __forceinline__ uint32_t v_empty(int stage) const { return k_full(3 * kStages + stage); }
  __device__ __forceinline__ Kept kept() const { return {base + kKept, k_full(4 * kStages)}; }

  __device__ __forceinline__ Notes<kStages> notes() const { return {base + kNotes}; }

  __device__ __forceinline__ void init_barriers() const {
    constexpr int kReaders = 4 * Config::kWarpgroups * ptx::kWarpArrivals;
    constexpr int kNoteReaders = kReaders + (Config::kDropout ? kFollowers * ptx::kWarpArrivals : 0);  // of Q's and K's
    ptx::mbarrier_init(raw(), 1);
    for (int stage = 0; stage < 2; ++stage) {
      ptx::mbarrier_init(q_full(stage), 1);
      ptx::mbarrier_init(q_empty(stage), kNoteReaders);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(k_full(stage), 1);
      ptx::mbarrier_init(v_full(stage), 1);
      ptx::mbarrier_init(k_empty(stage), kNoteReaders);
      ptx::mbarrier_init(v_empty(stage), kReaders);
    }
    kept().init_barriers();
    ptx::mbarrier_init_fence();
  }
};

}  // namespace flash_models
