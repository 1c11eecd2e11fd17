// SPDX-License-Identifier: Apache-2.0
//
// A cluster of CUDA thread blocks on one CPU thread: every CUDA thread is a fiber (ucontext) that runs until it meets
// others. Enough of CUDA C++ to run the kernels of kernels/attention unchanged, so that their indexing, masks,
// pipelines and barriers can be tested where there is no GPU. It finds wrong addresses, missing waits and deadlocks; it
// does not find every race, since fibers switch only where they meet, and it says nothing about speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulation {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  bool done = false;
  uint64_t awaited = 0;  // the round of the cluster's meeting that it arrived in
};

// Threads that wait for each other: a block or a warp.
struct Meeting {
  int expected = 0, arrived = 0;
  uint64_t round = 0;
};

constexpr int kMaxThreads = 512, kMaxCluster = 2;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers(kMaxThreads* kMaxCluster);
inline int thread = 0, rank = 0, first_block = 0, grid = 0;  // rank: of the block in its cluster
inline std::function<void()> body;
inline Meeting cluster_meeting, block_meeting[kMaxCluster], warp_meeting[kMaxCluster][kMaxThreads / 32],
    named_meeting[kMaxCluster][16];
alignas(128) inline char shared_memory[kMaxCluster][256 << 10];

inline Fiber& fiber() { return fibers[rank * kMaxThreads + thread]; }
inline void yield() { swapcontext(&fiber().context, &scheduler); }
inline Meeting& meeting_of_warp() { return warp_meeting[rank][thread / 32]; }

inline uint64_t arrive(Meeting& meeting, const std::function<void()>& last_one = nullptr) {
  const uint64_t round = meeting.round;
  if (++meeting.arrived == meeting.expected) {
    if (last_one) last_one();
    meeting.arrived = 0;
    ++meeting.round;
  }
  return round;
}

inline void wait_for(const Meeting& meeting, uint64_t round) {
  while (meeting.round == round) yield();
}

inline void wait_for_all(Meeting& meeting, const std::function<void()>& last_one = nullptr) {
  wait_for(meeting, arrive(meeting, last_one));
}

// One warp-wide instruction: `act` sees the operands of all lanes and fills in all results.
template <typename In, typename Out, typename Act>
Out warp_instruction(const In& in, Act act) {
  static In operands[kMaxCluster * kMaxThreads / 32][32];
  static Out results[kMaxCluster * kMaxThreads / 32][32];
  const int warp = (rank * kMaxThreads + thread) / 32, lane = thread % 32;
  operands[warp][lane] = in;
  wait_for_all(meeting_of_warp(), [&] { act(operands[warp], results[warp]); });
  const Out out = results[warp][lane];
  wait_for_all(meeting_of_warp());  // before anyone's next instruction of this kind overwrites the results
  return out;
}

inline void run_thread() {
  body();
  fiber().done = true;
  yield();
}

inline void run_cluster(int cluster, int threads) {
  cluster_meeting = {cluster * threads};
  std::memset(shared_memory, 0xFF, cluster * sizeof(*shared_memory));  // NaN: what nobody wrote must not be read
  auto for_each_thread = [&](auto act) {
    for (rank = 0; rank < cluster; ++rank)
      for (thread = 0; thread < threads; ++thread) act();
  };
  for (int r = 0; r < cluster; ++r) {
    block_meeting[r] = {threads};
    for (Meeting& meeting : warp_meeting[r]) meeting = {32};
    for (Meeting& meeting : named_meeting[r]) meeting = {};
  }
  for_each_thread([] {
    fiber().done = false;
    getcontext(&fiber().context);
    fiber().context.uc_stack.ss_sp = fiber().stack.data();
    fiber().context.uc_stack.ss_size = fiber().stack.size();
    makecontext(&fiber().context, run_thread, 0);
  });
  for (bool live = true; live;) {
    live = false;
    for_each_thread([&] {
      if (fiber().done) return;
      swapcontext(&scheduler, &fiber().context);
      live = live || !fiber().done;
    });
  }
}

struct Index {
  int x;
};

}  // namespace emulation

#define threadIdx (emulation::Index{emulation::thread})
#define blockIdx (emulation::Index{emulation::first_block + emulation::rank})
#define gridDim (emulation::Index{emulation::grid})

using std::max;
using std::min;

inline void __syncthreads() { emulation::wait_for_all(emulation::block_meeting[emulation::rank]); }
inline void __syncwarp() { emulation::wait_for_all(emulation::meeting_of_warp()); }

template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulation::warp_instruction<T, T>(x, [mask](const T* in, T* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[lane ^ mask];
  });
}

inline int __shfl_up_sync(unsigned, int x, int distance) {
  return emulation::warp_instruction<int, int>(x, [distance](const int* in, int* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[lane < distance ? lane : lane - distance];
  });
}

inline int __shfl_sync(unsigned, int x, int lane) {
  return emulation::warp_instruction<int, int>(x,
                                               [lane](const int* in, int* out) { std::fill(out, out + 32, in[lane]); });
}

inline bool __any_sync(unsigned, bool x) {
  return emulation::warp_instruction<bool, bool>(x, [](const bool* in, bool* out) {
    std::fill(out, out + 32, std::any_of(in, in + 32, [](bool value) { return value; }));
  });
}

inline unsigned __ballot_sync(unsigned, bool x) {
  return emulation::warp_instruction<bool, unsigned>(x, [](const bool* in, unsigned* out) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= unsigned{in[lane]} << lane;
    std::fill(out, out + 32, bits);
  });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline void __threadfence() {}  // one CPU thread

inline int atomicAdd(int* address, int x) {
  const int before = *address;
  *address += x;
  return before;
}

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return result;
}

template <typename To, typename From>
To bits_as(From x) {
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }

inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }

inline void* __cvta_shared_to_generic(uint32_t address) {
  if (address >= sizeof(*emulation::shared_memory)) throw std::runtime_error("shared memory address out of range");
  return emulation::shared_memory[emulation::rank] + address;
}
