// SPDX-License-Identifier: Apache-2.0
//
// Tiles of 16-bit elements in shared memory, and the warp-level products on them.
//
// A tile has rows of kDim elements. The 16-byte chunks of a row are XOR-swizzled by the row number so that the eight
// rows one ldmatrix phase touches fall into eight different bank groups: with rows of 128 or 256 bytes by the row's low
// three bits; rows of 64 or 192 bytes already alternate between two halves of the banks, so two bits of row / 2 are
// enough.
#pragma once

#include <type_traits>

#include "ampere/ptx.cuh"

namespace flash_models {

// Lane coordinates of an accumulator fragment (m16n8): rows lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) and + 1.
struct Lane {
  int id = threadIdx.x % 32;
  int row = id / 4;
  int col = 2 * (id % 4);
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float x, float y) {
  const __half2 v = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// The products of the two elements of either word.
template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t x, uint32_t y) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const Pair product = __hmul2(reinterpret_cast<const Pair&>(x), reinterpret_cast<const Pair&>(y));
  return reinterpret_cast<const uint32_t&>(product);
}

template <typename T, int kRows_, int kDim_>
struct Tile {
  static constexpr int kRows = kRows_, kDim = kDim_;
  static constexpr int kChunks = kDim / 8, kRowBytes = 2 * kDim, kBytes = kRows * kRowBytes;
  static_assert(kDim % 32 == 0 && kRows % 8 == 0);

  uint32_t base;  // shared-memory address

  // Byte offset of (row, chunk). Adding a multiple of 8 rows to `row` only adds that many kRowBytes.
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    const int key = kDim % 64 == 0 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + ((chunk ^ key) << 4);
  }

  // Starts the copy of kRows rows; rows outside [row_lo, row_hi) and chunks from dims_valid on become zeros. A thread
  // keeps its column of chunks, so that one 64-bit pointer and one uniform step address all it copies.
  template <int kThreads>
  __device__ __forceinline__ void load_async(const T* global, int64_t row_stride, int row_lo, int row_hi,
                                             int dims_valid) const {
    constexpr int kColumns = kChunks % 8 == 0 ? 8 : 4, kStep = kThreads / kColumns;
    static_assert(kRows % kStep == 0 && kStep % 8 == 0);
    const int first = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
    const T* source = global + first * row_stride + 8 * column;
#pragma unroll
    for (int row = 0; row < kRows; row += kStep, source += kStep * row_stride)
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += kColumns)
        ptx::cp_async_16(base + row * kRowBytes + offset(first, column + chunk), source + 8 * chunk,
                         first + row >= row_lo && first + row < row_hi && 8 * (column + chunk) < dims_valid);
  }

  // Copies rows [first, first + kCount) of the tile, as one warp, to global memory in 16-byte stores.
  template <int kCount>
  __device__ __forceinline__ void store_rows(int first, T* global, int64_t row_stride, int rows_valid,
                                             int dims_valid) const {
    for (int item = threadIdx.x % 32; item < kCount * kChunks; item += 32) {
      const int row = first + item / kChunks, chunk = item % kChunks;
      if (row < rows_valid && 8 * chunk < dims_valid) {
        *reinterpret_cast<uint4*>(global + row * row_stride + 8 * chunk) =
            *static_cast<const uint4*>(__cvta_shared_to_generic(base + offset(row, chunk)));
      }
    }
  }

  // Writes two neighbouring elements of one row; col is even.
  __device__ __forceinline__ void store_pair(int row, int col, uint32_t pair) const {
    *static_cast<uint32_t*>(__cvta_shared_to_generic(base + offset(row, col / 8) + 2 * (col % 8))) = pair;
  }
};

// Fragment sources. Each gives, for one 16-deep step of a product, what ldmatrix must address.

// A operand (16 x 16) whose rows are tile rows.
template <typename Tile>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Tile& t, int row0, int k0, int lane) {
  ptx::ldmatrix(a, t.base + row0 * Tile::kRowBytes + Tile::offset(lane % 16, k0 / 8 + lane / 16));
}

// A operand whose rows are tile columns.
template <typename Tile>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const Tile& t, int row0, int k0, int lane) {
  ptx::ldmatrix_transposed(
      a, t.base + k0 * Tile::kRowBytes + Tile::offset(lane / 16 * 8 + lane % 8, row0 / 8 + lane / 8 % 2));
}

// B operand (16 deep, 16 wide: b[0], b[1] for columns 0-7, b[2], b[3] for 8-15) whose columns are tile rows: X *
// tile^T.
template <typename Tile>
__device__ __forceinline__ void load_b_rows(uint32_t (&b)[4], const Tile& t, int col0, int k0, int lane) {
  ptx::ldmatrix(b, t.base + col0 * Tile::kRowBytes + Tile::offset(lane / 16 * 8 + lane % 8, k0 / 8 + lane / 8 % 2));
}

// B operand whose columns are tile columns: X * tile.
template <typename Tile>
__device__ __forceinline__ void load_b_columns(uint32_t (&b)[4], const Tile& t, int col0, int k0, int lane) {
  ptx::ldmatrix_transposed(b, t.base + k0 * Tile::kRowBytes + Tile::offset(lane % 16, col0 / 8 + lane / 16));
}

// acc[m][n] (kM x kN fragments) += A[row0 .. +16 kM][0 .. kDepth] * B. kATransposed: A's rows are tile columns.
// kBRows: B's columns are tile rows col0 .., otherwise tile columns col0 ...
template <typename T, int kDepth, bool kATransposed, bool kBRows, int kM, int kN, typename TileA, typename TileB>
__device__ __forceinline__ void multiply(float (&acc)[kM][kN][4], const TileA& ta, int row0, const TileB& tb, int col0,
                                         int lane) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if constexpr (kATransposed) {
        load_a_transposed(a[m], ta, row0 + 16 * m, k, lane);
      } else {
        load_a(a[m], ta, row0 + 16 * m, k, lane);
      }
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      if constexpr (kBRows) {
        load_b_rows(b, tb, col0 + 8 * n, k, lane);
      } else {
        load_b_columns(b, tb, col0 + 8 * n, k, lane);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma<T>(acc[m][n], a[m], b[0], b[1]);
        ptx::mma<T>(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += P * B where P (16 kM x 8 kP) is itself an accumulator: an m16n8 accumulator pair is laid out as an A operand.
template <typename T, int kM, int kP, int kN, typename TileB>
__device__ __forceinline__ void multiply_registers(float (&acc)[kM][kN][4], const float (&p)[kM][kP][4],
                                                   const TileB& tb, int lane) {
#pragma unroll
  for (int k = 0; k < kP; k += 2) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      a[m][0] = pack<T>(p[m][k][0], p[m][k][1]);
      a[m][1] = pack<T>(p[m][k][2], p[m][k][3]);
      a[m][2] = pack<T>(p[m][k + 1][0], p[m][k + 1][1]);
      a[m][3] = pack<T>(p[m][k + 1][2], p[m][k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      load_b_columns(b, tb, 8 * n, 8 * k, lane);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma<T>(acc[m][n], a[m], b[0], b[1]);
        ptx::mma<T>(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
}

// Rounds acc * factor to T and writes it to tile rows row0 .., columns col0 ...
template <typename T, int kM, int kN, typename Tile>
__device__ __forceinline__ void store_accumulator(const float (&acc)[kM][kN][4], const float (&factor)[kM][2],
                                                  const Tile& t, int row0, int col0, const Lane& lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        t.store_pair(row0 + 16 * m + 8 * half + lane.row, col0 + 8 * n + lane.col,
                     pack<T>(acc[m][n][2 * half] * factor[m][half], acc[m][n][2 * half + 1] * factor[m][half]));
}

}  // namespace flash_models
