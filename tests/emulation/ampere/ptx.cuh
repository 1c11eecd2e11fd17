// SPDX-License-Identifier: Apache-2.0
//
// The functions of kernels/ampere/ptx.cuh, in C++. Fragment layouts are written here from the tables of the PTX ISA,
// apart from how the kernels index them.
#pragma once

#include "threads.h"

namespace flash_models::ptx {

inline uint32_t dynamic_shared() { return 0; }

inline void await_previous_kernel() {}
inline void let_next_kernel_begin() {}

inline int lane_id() { return emulation::thread % 32; }

inline void cluster_arrive() { emulation::fiber().awaited = emulation::arrive(emulation::cluster_meeting); }
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() { emulation::wait_for(emulation::cluster_meeting, emulation::fiber().awaited); }
inline void store_to_cluster(uint32_t shared, int rank, float x) {
  std::memcpy(emulation::shared_memory[rank] + shared, &x, 4);
}

// A copy arrives when its thread waits for it; until then its target holds NaN.
struct Copy {
  uint32_t shared;
  int bytes;
  char data[16];
};
inline std::vector<std::vector<Copy>> copies(emulation::kMaxThreads);

inline void start_copy(uint32_t shared, const void* global, int bytes, bool valid) {
  if (shared % bytes != 0) throw std::runtime_error("misaligned cp.async");
  Copy copy{shared, bytes, {}};
  if (valid) std::memcpy(copy.data, global, bytes);
  std::memset(__cvta_shared_to_generic(shared), 0xFF, bytes);
  copies[emulation::thread].push_back(copy);
}

inline void cp_async_16(uint32_t shared, const void* global, bool valid) { start_copy(shared, global, 16, valid); }
inline void cp_async_4(uint32_t shared, const void* global) { start_copy(shared, global, 4, true); }
inline void cp_async_commit() {}

template <int kPending>
void cp_async_wait() {
  static_assert(kPending == 0);
  for (const Copy& copy : copies[emulation::thread])
    std::memcpy(__cvta_shared_to_generic(copy.shared), copy.data, copy.bytes);
  copies[emulation::thread].clear();
}

inline uint4 load_once_16(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) throw std::runtime_error("misaligned ld.v4");
  uint4 x;
  std::memcpy(&x, global, 16);
  return x;
}

struct Registers {
  uint32_t r[4];
};

inline void load_matrices(uint32_t (&r)[4], uint32_t shared, bool transposed) {
  if (shared % 16 != 0) throw std::runtime_error("misaligned ldmatrix");
  const Registers result =
      emulation::warp_instruction<uint32_t, Registers>(shared, [transposed](const uint32_t* rows, Registers* out) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          uint16_t x[8][8];
          for (int i = 0; i < 8; ++i) std::memcpy(x[i], __cvta_shared_to_generic(rows[8 * matrix + i]), 16);
          for (int lane = 0; lane < 32; ++lane) {
            const int i = lane / 4, j = 2 * (lane % 4);
            const uint32_t low = transposed ? x[j][i] : x[i][j], high = transposed ? x[j + 1][i] : x[i][j + 1];
            out[lane].r[matrix] = low | high << 16;
          }
        }
      });
  std::memcpy(r, result.r, sizeof(r));
}

inline void ldmatrix(uint32_t (&r)[4], uint32_t shared) { load_matrices(r, shared, false); }
inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t shared) { load_matrices(r, shared, true); }

inline uint32_t movmatrix_transposed(uint32_t x) {
  return emulation::warp_instruction<uint32_t, uint32_t>(x, [](const uint32_t* in, uint32_t* out) {
    auto element = [&](int i, int j) { return in[4 * i + j / 2] >> (16 * (j % 2)) & 0xFFFF; };
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      out[lane] = element(j, i) | element(j + 1, i) << 16;
    }
  });
}

template <uint32_t kSelector>
uint32_t byte_signs(uint32_t x) {
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i)
    if (x >> (8 * (kSelector >> (4 * i) & 7) + 7) & 1) y |= 0xFFu << (8 * i);
  return y;
}

template <typename T>
float half_of(uint32_t pair, int which) {
  T x;
  const uint16_t bits = pair >> (16 * which);
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    float d[4];
    uint32_t a[4], b[2];
  };
  struct Out {
    float d[4];
  };
  const In in{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Out result = emulation::warp_instruction<In, Out>(in, [](const In* lanes, Out* out) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = 2 * (lane % 4);
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) left[group + 8 * (r % 2)][pair + 8 * (r / 2) + e] = half_of<T>(lanes[lane].a[r], e);
        for (int r = 0; r < 2; ++r) right[pair + 8 * r + e][group] = half_of<T>(lanes[lane].b[r], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        float sum = lanes[lane].d[i];
        for (int k = 0; k < 16; ++k) sum += left[lane / 4 + 8 * (i / 2)][k] * right[k][2 * (lane % 4) + i % 2];
        out[lane].d[i] = sum;
      }
  });
  std::memcpy(d, result.d, sizeof(d));
}

inline float exp2_approx(float x) { return std::exp2(x); }

inline void red_add_fragment(float* fragment, int lane, const float (&x)[4]) {
  for (int i = 0; i < 4; ++i) fragment[4 * lane + i] += x[i];
}

inline void load_fragment(const float* fragment, int lane, float (&x)[4]) {
  std::memcpy(x, fragment + 4 * lane, sizeof(x));
}

}  // namespace flash_models::ptx
