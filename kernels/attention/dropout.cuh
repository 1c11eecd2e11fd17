// SPDX-License-Identifier: Apache-2.0
//
// Dropout on accumulator fragments. A 16 x 32 patch of (query, key) is one Philox call a lane; see dropout.h.
#pragma once

#include "ampere/tile.cuh"
#include "dropout.h"

namespace flash_models {

// Compares four bytes at once with the threshold: bit 7 of a byte of the result says that its element is kept.
// byte >= t is, with the low seven bits of either, carry(low + 128 - t_low) AND or OR the byte's own bit 7, as t < 128
// decides: the majority of the three.
struct Threshold {
  uint32_t addend, high;

  __device__ __forceinline__ explicit Threshold(uint32_t threshold)
      : addend((0x80u - (threshold & 0x7Fu)) * 0x01010101u), high(threshold < 0x80u ? ~0u : 0u) {
    ptx::forget(high);  // or the majority is no single LOP3
  }

  __device__ __forceinline__ uint32_t kept(uint32_t bytes) const {
    const uint32_t carry = (bytes & 0x7F7F7F7Fu) + addend;
    return (carry & bytes) | ((carry | bytes) & high);
  }
};

// What the draws of one head need, in registers.
struct Dropout {
  DropoutKey key;
  Threshold threshold;

  __device__ __forceinline__ Dropout(const AttentionProblem& p, int64_t batch_head)
      : key(p.rng_state, batch_head), threshold(p.dropout_threshold) {}
};

// What is kept of kM x kN fragments in natural layout: rows are queries q0 .., columns keys k0 .. (multiples of 32).
// Drawn apart from its use, so that the draw can run while products are under way.
template <int kM, int kN>
struct KeepBits {
  static_assert(kN % 4 == 0);
  uint32_t word[kM][kN];  // of a fragment: bit 7 of byte i is element i's

  __device__ __forceinline__ void draw(const Dropout& dropout, int q0, int k0, const Lane& lane) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int patch = 0; patch < kN / 4; ++patch) {
        const Philox bytes = dropout_patch(dropout.key, q0 / 16 + m, k0 / 32 + patch, lane.id);
#pragma unroll
        for (int i = 0; i < 4; ++i) word[m][4 * patch + i] = dropout.threshold.kept(bytes.word[i]);
      }
    }
  }

  // Zeroes the dropped elements.
  __device__ __forceinline__ void drop(float (&x)[kM][kN][4]) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        x[m][n][0] = __uint_as_float(__float_as_uint(x[m][n][0]) & ptx::byte_signs<0x8888>(word[m][n]));
        x[m][n][1] = __uint_as_float(__float_as_uint(x[m][n][1]) & ptx::byte_signs<0x9999>(word[m][n]));
        x[m][n][2] = __uint_as_float(__float_as_uint(x[m][n][2]) & ptx::byte_signs<0xAAAA>(word[m][n]));
        x[m][n][3] = __uint_as_float(__float_as_uint(x[m][n][3]) & ptx::byte_signs<0xBBBB>(word[m][n]));
      }
    }
  }
};

// The same for fragments of 16 queries that were rounded to 16 bits, as A operands: half the work. The bits are packed:
// of a fragment n, that of element i is bit 7 - n % 8 of byte i of word n / 8.
template <int kN>
struct KeepPacked {
  static_assert(kN % 8 == 0);
  static constexpr int kWords = kN / 8;
  uint32_t word[kWords];

  // The share of a word that patch number `patch` along the keys has.
  static __device__ __forceinline__ uint32_t share(const Threshold& threshold, const Philox& bytes, int patch) {
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed |= (threshold.kept(bytes.word[i]) & 0x80808080u) >> i;
    return packed >> (4 * (patch % 2));
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

// The bits of a 16 x 32 patch for transposed scores, whose rows are its keys: byte i has those of element i of the
// patch's key fragments 0 .. 3 in bits 7 .. 4. A lane draws its natural share; the halves of its bits that belong to
// even and to odd keys are two elements of an 8x8 matrix of 16-bit words, and one movmatrix hands every lane the words
// of its transposed position.
__device__ __forceinline__ uint32_t draw_transposed(const Dropout& dropout, int row_patch, int col_patch, int lane) {
  const Philox bytes = dropout_patch(dropout.key, row_patch, col_patch, lane);
  uint32_t gathered = 0;
#pragma unroll
  for (int keys = 0; keys < 4; ++keys) gathered |= (dropout.threshold.kept(bytes.word[keys]) & 0x80808080u) >> keys;
  return ptx::movmatrix_transposed(__byte_perm(gathered, 0, 0x3120));
}

// What is kept of kKeys x kQueries fragments of a warp's transposed scores: rows are keys k0 .., columns queries q0 ..
// (multiples of 16).
template <int kKeys, int kQueries>
struct KeepTransposed {
  static_assert(kQueries % 2 == 0 && (kKeys == 2 || kKeys == 4));  // a patch has four key fragments
  static constexpr int kPatches = kQueries / 2, kPerWord = 8 / kKeys, kWords = (kPatches + kPerWord - 1) / kPerWord;
  uint32_t word[kWords];

  // The share of a patch, number `patch` along the queries, that belongs to the keys from fragment `first` on.
  static __device__ __forceinline__ uint32_t share(uint32_t bits, int first, int patch) {
    return ((bits << first) & (kKeys == 2 ? 0xC0C0C0C0u : 0xF0F0F0F0u)) >> (kKeys * (patch % kPerWord));
  }

  __device__ __forceinline__ void draw(const Dropout& dropout, int q0, int k0, const Lane& lane) {
#pragma unroll
    for (int patch = 0; patch < kPatches; ++patch) {
      const uint32_t own = share(draw_transposed(dropout, q0 / 16 + patch, k0 / 32, lane.id), k0 / 8 % 4, patch);
      word[patch / kPerWord] = patch % kPerWord == 0 ? own : word[patch / kPerWord] | own;
    }
  }

  // Whether it keeps, of fragment (keys, queries), key lane.row and query lane.col + second.
  __device__ __forceinline__ bool kept(int keys, int queries, int second) const {
    const int patch = queries / 2, bit = 16 * second + 8 * (queries % 2) + 7 - keys - kKeys * (patch % kPerWord);
    return word[patch / kPerWord] >> bit & 1u;
  }

  // The same for both queries of a lane, as the 16-bit halves of a word: all ones where kept.
  __device__ __forceinline__ uint32_t mask(int keys, int queries) const {
    const int patch = queries / 2;
    const uint32_t signs = word[patch / kPerWord] << (keys + kKeys * (patch % kPerWord));
    return queries % 2 == 0 ? ptx::byte_signs<0xAA88>(signs) : ptx::byte_signs<0xBB99>(signs);
  }
};

}  // namespace flash_models
