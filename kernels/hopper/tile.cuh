// SPDX-License-Identifier: Apache-2.0
//
// Tiles of 16-bit elements as the copy engine writes and wgmma reads them, and the products on them.
//
// A tile of kDim columns is cut into panels of 64 columns (32 where kDim is no multiple of 64). A panel's rows are 128
// (64) bytes, swizzled by the engine: 16-byte chunk c of row r lies at chunk c ^ (r % 8), or c ^ (r / 2 % 4), so that
// eight rows of one column meet no bank twice.
#pragma once

#include "ampere/tile.cuh"
#include "hopper/ptx.cuh"
#include "hopper/wgmma.cuh"

namespace flash_models {

template <typename T, int kRows_, int kDim_>
struct PanelTile {
  static constexpr int kRows = kRows_, kDim = kDim_;
  static constexpr int kPanelDim = kDim % 64 == 0 ? 64 : 32, kPanels = kDim / kPanelDim;
  static constexpr int kRowBytes = 2 * kPanelDim, kPanelBytes = kRows * kRowBytes, kBytes = kPanels * kPanelBytes;
  static_assert(kDim % 32 == 0 && kRows % 8 == 0 && kRows <= 256);

  uint32_t base;  // shared-memory address, a multiple of 1,024

  // Starts the copy of rows seq .. seq + kRows - 1, by a warp; kBytes arrive at `barrier`.
  __device__ __forceinline__ void load(const CUtensorMap& map, uint32_t barrier, int seq, int head, int batch) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::tma_load_warp(base + panel * kPanelBytes, map, barrier, panel * kPanelDim, seq, head, batch);
  }

  // Writes zeros to rows [first, last), if there are any, by one warp.
  __device__ __forceinline__ void zero_rows(int first, int last) const {
    const int chunks = (last - first) * (kRowBytes / 16);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      for (int chunk = threadIdx.x % 32; chunk < chunks; chunk += 32)
        *static_cast<uint4*>(
            __cvta_shared_to_generic(base + panel * kPanelBytes + first * kRowBytes + 16 * chunk)) = {};
  }

  // "Matrix Descriptor", for an operand whose depth runs along the rows of the tile: element (row0 + i, k0 + j).
  __device__ __forceinline__ uint64_t by_rows(int row0, int k0) const {
    return descriptor(k0 / kPanelDim * kPanelBytes + row0 * kRowBytes + 2 * (k0 % kPanelDim));
  }

  // The same, for an operand whose depth runs down the columns: element (k0 + j, column0 + i).
  __device__ __forceinline__ uint64_t by_columns(int k0, int column0 = 0) const {
    return descriptor(column0 / kPanelDim * kPanelBytes + k0 * kRowBytes);
  }

  // Writes a warp's A operand (16 x 16) to rows row0 .. and columns column0 ...
  __device__ __forceinline__ void store_operand(int row0, int column0, const uint32_t (&a)[4], int lane) const {
    ptx::stmatrix(chunk(column0 / kPanelDim, row0 + lane % 16, column0 % kPanelDim / 8 + lane / 16), a);
  }

  // Reads such an operand.
  __device__ __forceinline__ void load_operand(int row0, int column0, uint32_t (&a)[4], int lane) const {
    ptx::ldmatrix(a, chunk(column0 / kPanelDim, row0 + lane % 16, column0 % kPanelDim / 8 + lane / 16));
  }

  // Starts the copy of rows row0 .. to global rows seq .., by one warp: as many as the boxes of `map` have.
  __device__ __forceinline__ void store_rows(const CUtensorMap& map, int row0, int seq, int head, int batch) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::tma_store_warp(map, base + panel * kPanelBytes + row0 * kRowBytes, panel * kPanelDim, seq, head, batch);
  }

  // Copies `rows` rows from row0 on and `dims` columns, by one warp: where the rows behind them belong to others.
  __device__ __forceinline__ void copy_rows(T* target, int64_t row_stride, int row0, int rows, int dims) const {
    for (int i = threadIdx.x % 32; i < rows * (kDim / 8); i += 32) {
      const int row = i / (kDim / 8), dim = 8 * (i % (kDim / 8));
      if (dim < dims)
        *reinterpret_cast<uint4*>(target + row * row_stride + dim) = *static_cast<const uint4*>(
            __cvta_shared_to_generic(chunk(dim / kPanelDim, row0 + row, dim % kPanelDim / 8)));
    }
  }

 private:
  // Address of a row's columns 8 i .. 8 i + 7 of a panel.
  __device__ __forceinline__ uint32_t chunk(int panel, int row, int i) const {
    const int key = kRowBytes == 128 ? row & 7 : (row >> 1) & 3;
    return base + panel * kPanelBytes + row * kRowBytes + ((i ^ key) << 4);
  }

  // Bits 0-13 the address, 16-29 the distance of panels (read where the depth runs down the columns), 32-45 that of
  // groups of eight rows, all in units of 16 bytes; 62-63 the swizzle, 1 for 128 bytes and 2 for 64. Shared memory ends
  // before the address does, so the offset is added to a word that a loop computes once.
  __device__ __forceinline__ uint64_t descriptor(int offset) const {
    constexpr uint64_t kHigh = (uint64_t{kRowBytes == 128 ? 1 : 2} << 62) | (uint64_t{8 * kRowBytes / 16} << 32);
    const uint32_t low = (base >> 4) + static_cast<uint32_t>(offset / 16) + (kPanelBytes / 16 << 16);
    return kHigh | low;
  }
};

// Rows of eight columns, 16 bytes, without a swizzle.
template <int kRows>
struct NarrowTile {
  static constexpr int kBytes = 16 * kRows;
  uint32_t base;  // shared-memory address, a multiple of 16

  // An operand whose depth runs along the rows, and that twice, for it is 16: the other operand has zeros in one half.
  __device__ __forceinline__ uint64_t by_rows() const { return uint64_t{8} << 32 | base >> 4; }
};

// Whether setmaxnreg can give each thread of the one producer and the `consumers` warpgroups of a CTA so many
// registers: it hands around what the launch allotted, no more, and waits for ever for the rest.
constexpr bool registers_suffice(int ctas_per_sm, int consumers, int of_producer, int of_consumer) {
  const int threads = 128 * (consumers + 1), launched = 65536 / (ctas_per_sm * threads) / 8 * 8;
  return 128 * (of_producer + consumers * of_consumer) <= threads * launched;
}

// Shared memory of a CTA when so many of them share an SM's 228 KB, of which the system takes 1 KB for each.
constexpr int shared_bytes(int ctas_per_sm) { return (228 / ctas_per_sm - 1) * 1024; }

// This thread's warpgroup, as a value that the compiler knows to be the same in all lanes.
__device__ __forceinline__ int warpgroup_of_thread() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
}

// What one warp fills tiles with. `full` is the barrier that a tile's readers wait for; `raw` one that only this warp
// knows, for tiles that it changes between their arrival and their use.
struct Producer {
  uint32_t raw, raw_parity = 0;
  bool leader = ptx::elect_one();

  // Brings rows seq .. of a head. Those outside [first, last) of the tile become zeros: they belong to nobody or to
  // another sequence and may hold anything, and what meets a probability of 0 must not be NaN.
  template <typename Tile>
  __device__ __forceinline__ void load(const Tile& tile, const CUtensorMap& map, uint32_t full, int seq, int head,
                                       int batch, int first = 0, int last = Tile::kRows) {
    const bool blank = first > 0 || last < Tile::kRows;
    const uint32_t arrived = blank ? raw : full;
    ptx::mbarrier_arrive_expect_warp(arrived, Tile::kBytes);
    tile.load(map, arrived, seq, head, batch);
    if (!blank) return;
    ptx::mbarrier_wait(raw, raw_parity);
    raw_parity ^= 1;
    tile.zero_rows(0, min(first, Tile::kRows));
    tile.zero_rows(max(last, 0), Tile::kRows);
    ptx::fence_proxy_async();
    __syncwarp();
    if (leader) ptx::mbarrier_arrive(full);
  }
};

// acc (+)= A * B^T, A: rows row0 .. row0 + 63 of `a`, B: all rows of `b`, both from column k0 on. Issues the products
// of one group.
template <typename T, typename TileA, typename TileB>
__device__ __forceinline__ void multiply_rows(float (&acc)[1][TileB::kRows / 8][4], const TileA& a, int row0,
                                              const TileB& b, bool accumulate = false, int k0 = 0) {
#pragma unroll
  for (int k = k0; k < TileA::kDim; k += 16)
    ptx::wgmma<T, false, false>(acc, a.by_rows(row0, k), b.by_rows(0, k), accumulate || k > 0);
}

// The same with A in registers.
template <typename T, typename TileB>
__device__ __forceinline__ void multiply_rows(float (&acc)[1][TileB::kRows / 8][4],
                                              const uint32_t (&a)[TileB::kDim / 16][4], const TileB& b) {
#pragma unroll
  for (int k = 0; k < TileB::kDim / 16; ++k) ptx::wgmma<T, false>(acc, a[k], b.by_rows(0, 16 * k), k > 0);
}

// acc = A^T * B, A: columns acol0 .. acol0 + 63 of `a`, B: as many columns of `b` from bcol0 on as acc has. Issues the
// products of one group.
template <typename T, int kN, typename TileA, typename TileB>
__device__ __forceinline__ void multiply_transposed(float (&acc)[1][kN][4], const TileA& a, int acol0, const TileB& b,
                                                    int bcol0) {
#pragma unroll
  for (int k = 0; k < TileA::kRows; k += 16)
    ptx::wgmma<T, true, true>(acc, a.by_columns(k, acol0), b.by_columns(k, bcol0), k > 0);
}

// acc (+)= A * B, A in registers, B: all of `b`. Issues the products of one group.
template <typename T, typename TileB>
__device__ __forceinline__ void multiply_columns(float (&acc)[1][TileB::kDim / 8][4],
                                                 const uint32_t (&a)[TileB::kRows / 16][4], const TileB& b,
                                                 bool accumulate) {
#pragma unroll
  for (int k = 0; k < TileB::kRows / 16; ++k) ptx::wgmma<T, true>(acc, a[k], b.by_columns(16 * k), accumulate || k > 0);
}

// Rounds acc * factor and writes a warp's 16 rows of it to rows row0 .. of a tile.
template <typename T, int kN, typename Tile>
__device__ __forceinline__ void store_operands(const Tile& tile, int row0, const float (&acc)[1][kN][4],
                                               const float (&factor)[1][2], int lane) {
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* x = acc[0][2 * k + i / 2] + 2 * (i % 2);
      a[i] = pack<T>(x[0] * factor[0][i % 2], x[1] * factor[0][i % 2]);
    }
    tile.store_operand(row0, 16 * k, a, lane);
  }
}

// Exchanges x[i] of lane j of a quad with x[j] of lane i: four lanes that each hold a column of four groups then hold a
// group each.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t received = __shfl_xor_sync(~0u, high ? x[i] : x[i + bit], bit);
      (high ? x[i] : x[i + bit]) = received;
    }
  }
}

// Rounds acc * factor and writes the warp's 16 rows to global memory, 16 bytes a lane. `rows`: the address of row
// 0 of the warp; the first `rows_valid` rows and `dims_valid` columns are written.
template <typename T, int kN>
__device__ __forceinline__ void store_fragments(const float (&acc)[1][kN][4], const float (&factor)[1][2], T* rows,
                                                int64_t row_stride, int rows_valid, int dims_valid, const Lane& lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane.row + 8 * half;
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[i] = pack<T>(acc[0][n + i][2 * half] * factor[0][half], acc[0][n + i][2 * half + 1] * factor[0][half]);
      transpose_quad(x);
      const int dim = 8 * n + 4 * lane.col;  // lane.col is twice the lane's place in its quad
      if (row < rows_valid && dim < dims_valid)
        *reinterpret_cast<uint4*>(rows + row * row_stride + dim) = {x[0], x[1], x[2], x[3]};
    }
  }
}

}  // namespace flash_models
