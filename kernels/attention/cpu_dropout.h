// SPDX-License-Identifier: Apache-2.0
//
// The dropout factors of a pair of tiles, in the order of its scores. dropout.h says which bit of which lane of a patch
// of 32 x 32 decides about an element; here the 32 lanes are computed together and their bits spread.
#pragma once

#include "cpu_tiles.h"

namespace flash_models::FM_ISA {

using Words = uint32_t __attribute__((vector_size(16)));
using Factors = float __attribute__((vector_size(16)));

struct Patch {
  uint32_t kept[32];
  float scale;

  // Lanes in the order pair * 8 + row % 8, so that neighbouring queries are neighbours.
  void draw_by_pair(const Dropout& dropout, int64_t row_patch, int64_t col_patch) {
    for (int i = 0; i < 32; ++i) kept[i] = dropout.kept(row_patch, col_patch, i % 8 * 4 + i / 8);
  }
  // Lanes in their own order, so that neighbouring keys are neighbours.
  void draw_by_row(const Dropout& dropout, int64_t row_patch, int64_t col_patch) {
    for (int i = 0; i < 32; ++i) kept[i] = dropout.kept(row_patch, col_patch, i);
  }

  // All ones where four lanes, from the i-th on, keep their element of row row % 16 + 16 m .. and column col.
  Words at(int i, int row, int col) const {
    Words words;
    __builtin_memcpy(&words, &kept[i], sizeof words);
    const int byte = row % 16 / 8 * 2 + col % 2, bit = 7 - (row / 16 * 4 + col / 8);
    return -(words >> (8 * byte + bit) & 1u);
  }

  void write(Words kept_words, float* factors) const {
    const Words bits = kept_words & __builtin_bit_cast(uint32_t, scale);
    __builtin_memcpy(factors, &bits, sizeof bits);
  }
};

// 0 or keep_scale for `lanes` own tokens from own_begin and kRowTokens others from `grid`.
template <Side kOwn>
inline void dropout_factors(const Head& head, int64_t own_begin, int64_t lanes, int64_t grid, float* factors) {
  const Dropout dropout(head.rng_state, head.batch_head, head.threshold_zeros);
  Patch patch;
  patch.scale = head.keep_scale;
  for (int64_t own = 0; own < lanes; own += 32) {
    for (int64_t other = 0; other < kRowTokens; other += 32) {
      if constexpr (kOwn == Side::kQueries) {
        patch.draw_by_pair(dropout, (own_begin + own) / 32, (grid + other) / 32);
        for (int col = 0; col < 32; ++col)
          for (int row = 0; row < 32; row += 4)
            patch.write(patch.at(col % 8 / 2 * 8 + row % 8, row, col), factors + (other + col) * kLanes + own + row);
      } else {
        patch.draw_by_row(dropout, (grid + other) / 32, (own_begin + own) / 32);
        for (int row = 0; row < 32; ++row) {
          for (int col = 0; col < 32; col += 8) {
            const Words even = patch.at(row % 8 * 4, row, col), odd = patch.at(row % 8 * 4, row, col + 1);
            float* target = factors + (other + row) * kLanes + own + col;
            patch.write(__builtin_shufflevector(even, odd, 0, 4, 1, 5), target);
            patch.write(__builtin_shufflevector(even, odd, 2, 6, 3, 7), target + 4);
          }
        }
      }
    }
  }
}

}  // namespace flash_models::FM_ISA
