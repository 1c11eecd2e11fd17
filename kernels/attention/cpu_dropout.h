// SPDX-License-Identifier: Apache-2.0
//
// The dropout factors of a pair of tiles, in the order of its scores. dropout.h says which byte of which counter
// decides about an element; here the 32 counters of a patch of 16 queries x 32 keys are computed together and their
// bytes spread.
#pragma once

#include "cpu_tiles.h"

namespace flash_models::FM_ISA {

// Four bytes of random bits, one in each lane's low bits, against the threshold.
using Words = uint32_t __attribute__((vector_size(16)));
using Factors = float __attribute__((vector_size(16)));

struct Keep {
  uint32_t threshold;
  float scale;

  void write(Words bytes, float* factors) const {
    const Factors kept = (bytes & 0xFFu) >= threshold ? scale - Factors{} : Factors{};
    __builtin_memcpy(factors, &kept, sizeof kept);
  }
};

// words[w][lane] for the 32 lanes of a patch. Word w holds keys 8 w to 8 w + 7; lane (row % 8) * 4 + pair keys 2 pair
// and 2 pair + 1 of them, in bytes 0 and 1 for row < 8, in bytes 2 and 3 for the others.
struct Patch {
  uint32_t words[4][32];

  // Lanes in the order pair * 8 + row % 8, so that neighbouring queries are neighbours.
  void draw_by_pair(const Head& head, int64_t row_patch, int64_t col_patch) {
    const DropoutKey key(head.rng_state, head.batch_head);
    for (int i = 0; i < 32; ++i) draw(key, row_patch, col_patch, i % 8 * 4 + i / 8, i);
  }
  // Lanes in their own order, so that neighbouring keys are neighbours.
  void draw_by_row(const Head& head, int64_t row_patch, int64_t col_patch) {
    const DropoutKey key(head.rng_state, head.batch_head);
    for (int i = 0; i < 32; ++i) draw(key, row_patch, col_patch, i, i);
  }

  Words at(int word, int i) const {
    Words w;
    __builtin_memcpy(&w, &words[word][i], sizeof w);
    return w;
  }

 private:
  void draw(const DropoutKey& key, int64_t row_patch, int64_t col_patch, int lane, int i) {
    const Philox bytes = dropout_patch(key, row_patch, col_patch, lane);
    words[0][i] = bytes.word[0], words[1][i] = bytes.word[1], words[2][i] = bytes.word[2], words[3][i] = bytes.word[3];
  }
};

// 0 or keep_scale for `lanes` own tokens from own_begin and kRowTokens others from `grid`.
template <Side kOwn>
inline void dropout_factors(const Head& head, int64_t own_begin, int lanes, int64_t grid, float* factors) {
  const Keep keep{head.dropout_threshold, head.keep_scale};
  Patch patch;
  if constexpr (kOwn == Side::kQueries) {
    for (int query = 0; query < lanes; query += 16) {
      for (int key = 0; key < kRowTokens; key += 32) {
        patch.draw_by_pair(head, (own_begin + query) / 16, (grid + key) / 32);
        for (int col = 0; col < 32; ++col) {
          float* target = factors + (key + col) * kLanes + query;
          for (int row = 0; row < 16; row += 4) {
            keep.write(patch.at(col / 8, col % 8 / 2 * 8 + row % 8) >> (row / 8 * 16 + col % 2 * 8), target + row);
          }
        }
      }
    }
  } else {
    for (int query = 0; query < kRowTokens; query += 16) {
      for (int key = 0; key < lanes; key += 32) {
        patch.draw_by_row(head, (grid + query) / 16, (own_begin + key) / 32);
        for (int row = 0; row < 16; ++row) {
          for (int word = 0; word < 4; ++word) {
            const Words even = patch.at(word, row % 8 * 4) >> (row / 8 * 16), odd = even >> 8;
            float* target = factors + (query + row) * kLanes + key + word * 8;
            keep.write(__builtin_shufflevector(even, odd, 0, 4, 1, 5), target);
            keep.write(__builtin_shufflevector(even, odd, 2, 6, 3, 7), target + 4);
          }
        }
      }
    }
  }
}

}  // namespace flash_models::FM_ISA
