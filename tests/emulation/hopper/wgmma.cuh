// SPDX-License-Identifier: Apache-2.0
//
// The functions of kernels/hopper/wgmma.cuh, in C++. A product is computed when its issuer waits for its group; until
// then its accumulator holds NaN and its operands in shared memory are unread, so that a wait that comes too late or a
// stage that is released too early shows.
#pragma once

#include <deque>
#include <map>
#include <set>

#include "ampere/ptx.cuh"
#include "hopper/ptx.cuh"

namespace flash_models::ptx {

struct Product {
  float* accumulator;
  std::function<void()> compute;
};
using Group = std::vector<Product>;

// What one thread has under way: its groups, and the values of the accumulators that they add to.
struct UnderWay {
  Group open;
  std::deque<Group> committed;
  std::map<float*, std::vector<float>> values;
};
inline std::vector<UnderWay> under_way(emulation::kMaxThreads);

// An operand element by its descriptor: `across` counts rows of A or columns of B, `depth` the summed index.
template <typename T>
float element(uint64_t descriptor, bool transposed, int across, int depth) {
  constexpr int kRowBytes[] = {16, 128, 64};  // by the swizzle: none, of 128 bytes, of 64
  const int row_bytes = kRowBytes[descriptor >> 62], panel = row_bytes / 2;
  const uint32_t base = (descriptor & 0x3FFF) << 4, panels = (descriptor >> 16 & 0x3FFF) << 4,
                 groups_of_8 = (descriptor >> 32 & 0x3FFF) << 4;
  const int row = transposed ? depth : across, column = transposed ? across : depth;
  const uint32_t address =
      base + row / 8 * groups_of_8 + row % 8 * row_bytes + 2 * (column % panel) + column / panel * panels;
  T x;
  std::memcpy(&x, __cvta_shared_to_generic(swizzled(address, row_bytes)), 2);
  return static_cast<float>(x);
}

template <int kFragments, typename A, typename B>
void issue(float (&d)[1][kFragments][4], bool accumulate, A a, B b) {
  const int thread = emulation::thread, lane = thread % 32, row0 = thread % 128 / 32 * 16 + lane / 4;
  float* first = &d[0][0][0];
  UnderWay& mine = under_way[thread];
  if (!mine.values.count(first)) mine.values[first] = std::vector<float>(first, first + 4 * kFragments);
  std::fill(first, first + 4 * kFragments, std::nanf(""));
  auto compute = [=, &mine] {
    std::vector<float>& values = mine.values.at(first);
    for (int i = 0; i < 4 * kFragments; ++i) {
      const int row = row0 + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      float sum = accumulate ? values[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a(row, k) * b(column, k);
      values[i] = sum;
    }
  };
  mine.open.push_back({first, compute});
}

template <typename T, bool kATransposed, bool kBTransposed, int kFragments>
void wgmma(float (&d)[1][kFragments][4], uint64_t a, uint64_t b, bool accumulate) {
  issue(
      d, accumulate, [=](int row, int k) { return element<T>(a, kATransposed, row, k); },
      [=](int column, int k) { return element<T>(b, kBTransposed, column, k); });
}

template <typename T, bool kBTransposed, int kFragments>
void wgmma(float (&d)[1][kFragments][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  struct Warp {
    Registers lane[32];
  };
  const Registers own{{a[0], a[1], a[2], a[3]}};
  const Warp warp = emulation::warp_instruction<Registers, Warp>(own, [](const Registers* in, Warp* out) {
    for (int lane = 0; lane < 32; ++lane) std::copy(in, in + 32, out[lane].lane);
  });
  issue(
      d, accumulate,
      [=](int row, int k) {
        const int local = row % 16;
        return half_of<T>(warp.lane[local % 8 * 4 + k % 8 / 2].r[local / 8 + 2 * (k / 8)], k % 2);
      },
      [=](int column, int k) { return element<T>(b, kBTransposed, column, k); });
}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  UnderWay& mine = under_way[emulation::thread];
  mine.committed.push_back(std::exchange(mine.open, {}));
}

template <int kPending>
void wgmma_wait() {
  UnderWay& mine = under_way[emulation::thread];
  if (!mine.open.empty()) throw std::runtime_error("a product was issued and not committed");
  for (; mine.committed.size() > kPending; mine.committed.pop_front())
    for (const Product& product : mine.committed.front()) product.compute();
  std::set<float*> busy;
  for (const Group& group : mine.committed)
    for (const Product& product : group) busy.insert(product.accumulator);
  for (auto it = mine.values.begin(); it != mine.values.end();) {
    const auto& [first, values] = *it;
    if (!busy.count(first)) std::copy(values.begin(), values.end(), first);
    it = busy.count(first) ? std::next(it) : mine.values.erase(it);
  }
}

}  // namespace flash_models::ptx
