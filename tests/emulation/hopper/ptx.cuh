// SPDX-License-Identifier: Apache-2.0
//
// The functions of kernels/hopper/ptx.cuh, in C++. What the copy engine brings is not in shared memory before a thread
// that waits for its barrier sees it complete.
#pragma once

#include <cuda.h>

#include <map>

#include "ampere/ptx.cuh"
#include "threads.h"

namespace flash_models::ptx {

inline uint32_t swizzled_shared() { return 0; }

// What an emulated CUtensorMap holds.
struct TensorView {
  char* data;
  int64_t sizes[4], strides[3];  // elements; strides of seq, head and batch
  int box_dim, box_rows;
};
static_assert(sizeof(TensorView) <= sizeof(CUtensorMap));

// A box under way.
struct Box {
  TensorView view;
  uint32_t shared;
  int at[4];
};

// The same of contiguous bytes.
struct Bytes {
  const void* data;
  uint32_t shared;
  int count;
};

struct Barrier {
  int count = 0, arrived = 0, bytes = 0, phase = 0;
  std::vector<Box> boxes;
  std::vector<Bytes> copies;
};
inline std::map<uint32_t, Barrier> barriers;

// Rows of 128 bytes have bits 4-6 of an address exchanged with bits 7-9, rows of 64 bytes bits 4-5 with 7-8, those of
// 16 none.
inline uint32_t swizzled(uint32_t address, int row_bytes) {
  return address ^ ((address >> 7 & (row_bytes / 16 - 1)) << 4);
}

// To shared memory, zeros for what lies outside the tensor, or from it.
inline void transfer(const Box& box, bool to_shared) {
  const TensorView& view = box.view;
  const int row_bytes = 2 * view.box_dim;
  for (int row = 0; row < view.box_rows; ++row)
    for (int column = 0; column < view.box_dim; ++column) {
      const int64_t dim = box.at[0] + column, seq = box.at[1] + row;
      char* global =
          view.data + 2 * (dim + seq * view.strides[0] + box.at[2] * view.strides[1] + box.at[3] * view.strides[2]);
      void* shared = __cvta_shared_to_generic(swizzled(box.shared + row * row_bytes + 2 * column, row_bytes));
      const bool inside = dim < view.sizes[0] && seq >= 0 && seq < view.sizes[1];
      if (to_shared) {
        inside ? std::memcpy(shared, global, 2) : std::memset(shared, 0, 2);
      } else if (inside) {
        std::memcpy(global, shared, 2);
      }
    }
}

inline void end_phase(Barrier& barrier) {
  if (barrier.arrived < barrier.count || barrier.bytes != 0) return;
  barrier.arrived = 0;
  ++barrier.phase;
}

inline void mbarrier_init(uint32_t barrier, int count) { barriers[barrier] = {count}; }
inline void mbarrier_init_fence() {}

inline void mbarrier_arrive(uint32_t address) {
  Barrier& barrier = barriers.at(address);
  if (++barrier.arrived > barrier.count) throw std::runtime_error("more arrivals at an mbarrier than it expects");
  end_phase(barrier);
}

inline bool elect_one() { return emulation::thread % 32 == 0; }

constexpr int kWarpArrivals = 1;
inline void mbarrier_arrive_warp(uint32_t address) {
  __syncwarp();
  if (emulation::thread % 32 == 0) mbarrier_arrive(address);
}

// What is under way from shared to global memory, by the thread that issued it; it happens when that one waits.
inline std::map<int, std::vector<std::function<void()>>> bulk_groups;

constexpr uint64_t kCachedAsAll = 0, kCachedLongest = 1;
inline float4 load_last_16(const void* global) { return *static_cast<const float4*>(global); }
inline void bulk_add_warp(float* global, uint32_t shared, int bytes, uint64_t) {
  if (emulation::thread % 32 != 0) return;
  bulk_groups[emulation::thread].push_back([=] {
    for (int i = 0; i < bytes / 4; ++i) global[i] += static_cast<const float*>(__cvta_shared_to_generic(shared))[i];
  });
}

inline void tma_store_warp(const CUtensorMap& map, uint32_t shared, int dim, int seq, int head, int batch) {
  if (emulation::thread % 32 != 0) return;
  Box box{{}, shared, {dim, seq, head, batch}};
  std::memcpy(&box.view, &map, sizeof(TensorView));
  bulk_groups[emulation::thread].push_back([box] { transfer(box, false); });
}

inline void bulk_wait_read_warp() {
  for (const auto& act : std::exchange(bulk_groups[emulation::thread], {})) act();
  __syncwarp();
}

inline void mbarrier_arrive_expect_warp(uint32_t address, int bytes) {
  if (emulation::thread % 32 != 0) return;
  barriers.at(address).bytes += bytes;
  mbarrier_arrive(address);
}

// What the copy engine has been told happens when somebody looks.
inline bool mbarrier_test(uint32_t address, uint32_t parity) {
  Barrier& barrier = barriers.at(address);
  for (const Box& box : std::exchange(barrier.boxes, {})) {
    transfer(box, true);
    barrier.bytes -= 2 * box.view.box_dim * box.view.box_rows;
    end_phase(barrier);
  }
  for (const Bytes& bytes : std::exchange(barrier.copies, {})) {
    std::memcpy(__cvta_shared_to_generic(bytes.shared), bytes.data, bytes.count);
    barrier.bytes -= bytes.count;
    end_phase(barrier);
  }
  return barrier.phase % 2 != static_cast<int>(parity);
}

inline void mbarrier_wait(uint32_t address, uint32_t parity) {
  while (!mbarrier_test(address, parity)) emulation::yield();
}

inline void bulk_load_warp(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  if (emulation::thread % 32 != 0) return;
  if (shared % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0)
    throw std::runtime_error("a bulk copy is misaligned");
  std::memset(__cvta_shared_to_generic(shared), 0xFF, bytes);
  barriers.at(barrier).copies.push_back({global, shared, bytes});
}

inline void tma_load_warp(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int dim, int seq, int head,
                          int batch) {
  if (emulation::thread % 32 != 0) return;
  Box box{{}, shared, {dim, seq, head, batch}};
  std::memcpy(&box.view, &map, sizeof(TensorView));
  if (shared % (16 * box.view.box_dim) != 0) throw std::runtime_error("a swizzled tile is misaligned");
  std::memset(__cvta_shared_to_generic(shared), 0xFF, 2 * box.view.box_dim * box.view.box_rows);
  barriers.at(barrier).boxes.push_back(box);
}

inline void stmatrix(uint32_t shared, const uint32_t (&r)[4]) {
  if (shared % 16 != 0) throw std::runtime_error("misaligned stmatrix");
  struct Lane {
    uint32_t address;
    Registers x;
  };
  emulation::warp_instruction<Lane, int>({shared, {r[0], r[1], r[2], r[3]}}, [](const Lane* in, int*) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < 32; ++lane)
        std::memcpy(static_cast<char*>(__cvta_shared_to_generic(in[8 * matrix + lane / 4].address)) + lane % 4 * 4,
                    &in[lane].x.r[matrix], 4);
  });
}

inline void fence_proxy_async() {}

inline void named_barrier_arrive(int id, int threads) {
  emulation::Meeting& meeting = emulation::named_meeting[emulation::rank][id];
  meeting.expected = threads;
  emulation::arrive(meeting);
}

inline void named_barrier_sync(int id, int threads) {
  emulation::Meeting& meeting = emulation::named_meeting[emulation::rank][id];
  meeting.expected = threads;
  emulation::wait_for_all(meeting);
}

template <int kRegisters>
void raise_registers() {}
template <int kRegisters>
void lower_registers() {}

}  // namespace flash_models::ptx
