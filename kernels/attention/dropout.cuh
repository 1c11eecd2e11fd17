// SPDX-License-Identifier: Apache-2.0
//
// Dropout on accumulator fragments; dropout.h says which bit of a patch of 32 x 32 is which element's.
#pragma once

#include "ampere/tile.cuh"
#include "dropout.h"

namespace flash_models {

// What is kept of kM x kN fragments in natural layout: rows are queries q0 .., a multiple of 16 kM, columns keys k0 ..,
// of 32.
template <int kM, int kN>
struct KeepBits {
  static_assert(kN % 4 == 0 && kM <= 2);
  uint32_t word[kN / 4];  // of fragment (m, n), bit 7 - (4 m + n % 4) of byte i of word n / 4 is element i's

  __device__ __forceinline__ void draw(const Dropout& dropout, int q0, int k0, const Lane& lane) {
#pragma unroll
    for (int patch = 0; patch < kN / 4; ++patch)
      word[patch] = dropout.kept(q0 / 32, k0 / 32 + patch, lane.id) << (q0 % 32 / 4);
  }

  // Zeroes the dropped elements.
  __device__ __forceinline__ void drop(float (&x)[kM][kN][4]) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const uint32_t signs = word[n / 4] << (4 * m + n % 4);
        x[m][n][0] = __uint_as_float(__float_as_uint(x[m][n][0]) & ptx::byte_signs<0x8888>(signs));
        x[m][n][1] = __uint_as_float(__float_as_uint(x[m][n][1]) & ptx::byte_signs<0x9999>(signs));
        x[m][n][2] = __uint_as_float(__float_as_uint(x[m][n][2]) & ptx::byte_signs<0xAAAA>(signs));
        x[m][n][3] = __uint_as_float(__float_as_uint(x[m][n][3]) & ptx::byte_signs<0xBBBB>(signs));
      }
    }
  }
};

// The same for 16 queries and fragments that were rounded to 16 bits, as A operands: half the work. Bit 7 - n % 8 of
// byte i of word n / 8 is element i's of fragment n.
template <int kN>
struct KeepPacked {
  static_assert(kN % 8 == 0);
  uint32_t word[kN / 8];

  // The words of the upper and the lower 16 queries of 32, for the 64 keys of two patches.
  static __device__ __forceinline__ void split(const uint32_t (&patches)[2], uint32_t (&words)[2]) {
    words[0] = (patches[0] & 0xF0F0F0F0u) | (patches[1] >> 4 & 0x0F0F0F0Fu);
    words[1] = (patches[0] << 4 & 0xF0F0F0F0u) | (patches[1] & 0x0F0F0F0Fu);
  }

  __device__ __forceinline__ void drop(uint32_t (&a)[kN / 2][4]) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const uint32_t signs = word[n / 8] << n % 8;
      a[n / 2][2 * (n % 2)] &= ptx::byte_signs<0x9988>(signs);
      a[n / 2][2 * (n % 2) + 1] &= ptx::byte_signs<0xBBAA>(signs);
    }
  }
};

// A patch's bits for transposed scores, whose rows are its keys. The halves of a lane's bits that belong to even and to
// odd keys are two elements of an 8x8 matrix of 16-bit words, and one movmatrix hands every lane the words of its
// transposed position.
__device__ __forceinline__ uint32_t transposed(uint32_t kept) {
  return ptx::movmatrix_transposed(__byte_perm(kept, 0, 0x3120));
}

// What is kept of a warp's transposed scores: rows are keys, columns kQueries fragments of queries. Of key fragment
// `keys` and query fragment n, bit 7 - (n % 4 / 2 * 4 + keys) of byte 2 * second + n % 2 of word n / 4 is the one of
// key lane.row and query lane.col + second.
template <int kQueries>
struct KeepTransposed {
  static_assert(kQueries % 4 == 0);
  uint32_t word[kQueries / 4];

  // Queries q0 .., keys k0 .., both multiples of 32.
  __device__ __forceinline__ void draw(const Dropout& dropout, int q0, int k0, const Lane& lane) {
#pragma unroll
    for (int patch = 0; patch < kQueries / 4; ++patch)
      word[patch] = transposed(dropout.kept(q0 / 32 + patch, k0 / 32, lane.id));
  }

  __device__ __forceinline__ bool kept(int keys, int n, int second) const {
    return word[n / 4] >> (8 * (2 * second + n % 2) + 7 - (n % 4 / 2 * 4 + keys)) & 1u;
  }

  // The same for both queries of a lane, as the 16-bit halves of a word: all ones where kept.
  __device__ __forceinline__ uint32_t mask(int keys, int n) const {
    const uint32_t signs = word[n / 4] << (n % 4 / 2 * 4 + keys);
    return n % 2 == 0 ? ptx::byte_signs<0xAA88>(signs) : ptx::byte_signs<0xBB99>(signs);
  }
};

}  // namespace flash_models
