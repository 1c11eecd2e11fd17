// SPDX-License-Identifier: Apache-2.0
//
// Lists of the blocks of a mask, and of the work that they are, in four launches: what takes 72 in plain PyTorch. And a
// mask of random blocks, in one.
//
//   count     a warp a line: its blocks
//   scan      one CTA: where each line begins
//   fill      a warp a line: the numbers of its blocks, in order
//   items     one CTA: the pieces of every line
#include "ampere/launch.cuh"
#include "ampere/ptx.cuh"
#include "layout.h"
#include "numbers.h"

namespace flash_models {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// The sum of x over the threads before this one, and over all threads in `total`. By a whole CTA.
__device__ __forceinline__ int scan(int x, int& total) {
  int* warps = static_cast<int*>(__cvta_shared_to_generic(ptx::dynamic_shared()));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = x;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += before;
  }
  __syncthreads();  // whoever still reads the sums of the call before
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += warps[i];
    total += warps[i];
  }
  return before + sum - x;
}

// Where `start` says that a line begins, and behind it where it ends: a head has one entry more than lines.
template <typename Start>
__device__ __forceinline__ Start* entry_of(Start* start, int64_t line, int64_t lines) {
  return start + line + line / lines;
}

// The line of a warp, and its blocks, 32 at a time.
struct Line {
  const BlockMask& mask;
  const int number;
  const bool exists;
  const int64_t head, place, length;  // place: in the head

  __device__ __forceinline__ explicit Line(const BlockMask& mask)
      : mask(mask),
        number(blockIdx.x * kWarps + threadIdx.x / 32),
        exists(number < mask.heads * mask.lines),
        head(number / mask.lines),
        place(number % mask.lines),
        length(exists ? mask.length : 0) {}

  __device__ __forceinline__ bool lists(int64_t block) const {
    if (block >= length) return false;
    if (min(place, block) < mask.global_blocks || abs(place - block) <= mask.reach) return true;
    return mask.data[head * mask.head_stride + place * mask.line_stride + block * mask.stride] != 0;
  }
  // A bit for each of the blocks first .. first + 31 that is listed.
  __device__ __forceinline__ uint32_t listed(int64_t first) const {
    return __ballot_sync(~0u, lists(first + threadIdx.x % 32));
  }
};

__global__ void __launch_bounds__(kThreads) block_lists_count(const __grid_constant__ BlockMask mask, int32_t* counts) {
  const Line line(mask);
  int count = 0;
  for (int64_t first = 0; first < line.length; first += 32) count += __popc(line.listed(first));
  if (line.exists && threadIdx.x % 32 == 0) counts[line.number] = count;
}

__global__ void __launch_bounds__(kThreads)
    block_lists_scan(const int32_t* counts, int64_t heads, int64_t lines, int32_t* start) {
  int before = 0;
  for (int64_t first = 0; first < heads * lines; first += kThreads) {
    const int64_t line = first + threadIdx.x;
    const int count = line < heads * lines ? counts[line] : 0;
    int total;
    const int begin = before + scan(count, total);
    before += total;
    if (line >= heads * lines) continue;
    int32_t* here = entry_of(start, line, lines);
    here[0] = begin;
    if (line % lines == lines - 1) here[1] = begin + count;
  }
}

__global__ void __launch_bounds__(kThreads)
    block_lists_fill(const __grid_constant__ BlockMask mask, const int32_t* start, int64_t max_listed, int32_t* index) {
  const Line line(mask);
  const int lane = threadIdx.x % 32;
  int64_t next = line.exists ? *entry_of(start, line.number, mask.lines) : 0;
  for (int64_t first = 0; first < line.length; first += 32) {
    const uint32_t listed = line.listed(first);
    const int64_t mine = next + __popc(listed & ((1u << lane) - 1));
    if (listed >> lane & 1 && mine < max_listed) index[mine] = static_cast<int32_t>(first + lane);
    next += __popc(listed);
  }
  const int64_t spare = start[mask.heads * (mask.lines + 1) - 1] + int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = spare; i < max_listed; i += int64_t{gridDim.x} * kThreads) index[i] = 0;
}

__global__ void __launch_bounds__(kThreads) layout_work_items(const int32_t* start, int64_t heads, int64_t lines,
                                                              int64_t max_blocks, int64_t max_partial, int4* items) {
  int items_before = 0, slots_before = 0;
  const int64_t count = heads * lines;
  for (int64_t first_line = 0; first_line < count; first_line += kThreads) {
    const int64_t line = first_line + threadIdx.x;
    int64_t begin = 0, length = 0;
    if (line < count) {
      const int32_t* here = entry_of(start, line, lines);
      begin = here[0], length = here[1] - begin;
    }
    int pieces = line < count ? static_cast<int>(max(int64_t{1}, (length + max_blocks - 1) / max_blocks)) : 0, total;
    const int partial = pieces > 1 ? pieces : 0;
    int slot = slots_before + scan(partial, total);
    slots_before += total;
    if (slot + partial > max_partial) pieces = min(pieces, 1);  // no slots are left: it stays whole
    const int item = items_before + scan(pieces, total);
    items_before += total;
    for (int piece = 0; piece < pieces; ++piece)
      items[item + piece] = {static_cast<int>(line), static_cast<int>(begin + length * piece / pieces),
                             static_cast<int>(begin + length * (piece + 1) / pieces), pieces > 1 ? slot + piece : -1};
  }
  for (int64_t item = items_before + threadIdx.x; item < count + max_partial; item += kThreads)
    items[item] = {-1, 0, 0, -1};
}

// Wellons' hash `lowbias32`.
__device__ __forceinline__ uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

// A thread draws one block, of one part of a row's free blocks: [global_blocks, low) and [high, n).
__global__ void __launch_bounds__(kThreads)
    layout_random_blocks(uint8_t* mask, int64_t n, int64_t reach, int64_t global_blocks, int64_t parts, uint32_t seed) {
  const int64_t number = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = number / parts, part = number % parts;
  if (row >= n) return;
  const int64_t low = max(row - reach, global_blocks), high = max(min(row + reach + 1, n), low);
  const int64_t before_band = low - global_blocks, free = before_band + n - high;
  const int64_t begin = free * part / parts, end = free * (part + 1) / parts;
  if (begin == end) return;
  const int64_t drawn = begin + mixed(static_cast<uint32_t>(number) ^ mixed(seed)) % (end - begin);
  mask[row * n + (drawn < before_band ? global_blocks + drawn : high + drawn - before_band)] = 1;
}

}  // namespace

void random_blocks_cuda(uint8_t* mask, int64_t n, int64_t reach, int64_t global_blocks, int64_t parts, uint32_t seed,
                        void* stream) {
  launch<layout_random_blocks, 0>("layout_random_blocks", ceil_div(n * parts, kThreads), kThreads, stream, mask, n,
                                  reach, global_blocks, parts, seed);
}

void block_lists_cuda(const BlockMask& mask, int64_t max_listed, int32_t* counts, int32_t* start, int32_t* index,
                      void* stream) {
  const int64_t ctas = ceil_div(mask.count(), kWarps);
  launch<block_lists_count, 0>("block_lists_count", ctas, kThreads, stream, mask, counts);
  launch<block_lists_scan, 4 * kWarps>("block_lists_scan", 1, kThreads, stream, counts, mask.heads, mask.lines, start);
  launch<block_lists_fill, 0>("block_lists_fill", ctas, kThreads, stream, mask, start, max_listed, index);
}

void work_items_cuda(const int32_t* start, int64_t heads, int64_t lines, int64_t max_blocks, int64_t max_partial,
                     int32_t* items, void* stream) {
  launch<layout_work_items, 4 * kWarps>("layout_work_items", 1, kThreads, stream, start, heads, lines, max_blocks,
                                        max_partial, reinterpret_cast<int4*>(items));
}

}  // namespace flash_models
