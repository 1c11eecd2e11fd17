// SPDX-License-Identifier: Apache-2.0
//
// What makes the lists of a block layout on a GPU; _layout_ops.py says what they hold.
#pragma once

#include <cstdint>

namespace flash_models {

// A mask of blocks, (heads, lines, length) bytes, 0 or 1; a line is a row of blocks or, transposed, a column. Listed
// are also the blocks of a band, at most `reach` from the diagonal, and the first `global_blocks` rows and columns.
struct BlockMask {
  const uint8_t* data;
  int64_t heads, lines, length;
  int64_t head_stride, line_stride, stride;  // elements
  int64_t reach, global_blocks;

  int64_t count() const { return heads * lines; }
};

// A mask of n x n bytes, zeros before: marks `parts` random blocks of each row outside of a band and of global blocks.
void random_blocks_cuda(uint8_t* mask, int64_t n, int64_t reach, int64_t global_blocks, int64_t parts, uint32_t seed,
                        void* stream);

// start (heads, lines + 1) and index (max_listed), from counts, scratch memory of an int32 for each line.
void block_lists_cuda(const BlockMask& mask, int64_t max_listed, int32_t* counts, int32_t* start, int32_t* index,
                      void* stream);

// items (heads * lines + max_partial, 4), from start (heads, lines + 1).
void work_items_cuda(const int32_t* start, int64_t heads, int64_t lines, int64_t max_blocks, int64_t max_partial,
                     int32_t* items, void* stream);

}  // namespace flash_models
