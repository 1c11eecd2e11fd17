// SPDX-License-Identifier: Apache-2.0
//
// Schemas, registration and checks of the ops that make block layouts. On a CPU, and where the library has no CUDA
// kernels, _layout_ops.py serves them.
#include "op.h"
#include "layout.h"

#ifdef FLASH_MODELS_CUDA  // the dispatch key of the kernels: CUDA, or CPU in the tests that emulate a GPU
namespace flash_models {
namespace {

constexpr int64_t kMost = 0x7FFFFFFF;  // what the lists count in int32

int32_t* integers(const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }

void block_lists(StableIValue* values, uint64_t, uint64_t) {
  Stack stack{values};
  const Tensor mask = stack.take<Tensor>();
  const int64_t max_listed = stack.take<int64_t>();
  const bool transposed = stack.take<bool>();
  const int64_t reach = stack.take<int64_t>(), global_blocks = stack.take<int64_t>();
  STD_TORCH_CHECK(mask.dim() == 3 && mask.scalar_type() == ScalarType::Bool && mask.numel() > 0 &&
                      mask.numel() <= kMost && max_listed >= 0 && max_listed <= mask.numel(),
                  "flash_models: block_lists needs a bool mask (heads, rows, columns) of 1 to 2^31 - 1 blocks and at "
                  "most as many listed; got shape ",
                  shape_of(mask), " and max_listed ", max_listed);
  const auto guard = on_device_of(mask);
  const int64_t line = transposed ? 2 : 1, other = 3 - line;
  const BlockMask blocks{static_cast<const uint8_t*>(mask.const_data_ptr()),
                         mask.size(0),
                         mask.size(line),
                         mask.size(other),
                         mask.stride(0),
                         mask.stride(line),
                         mask.stride(other),
                         reach,
                         global_blocks};
  const Tensor start = empty_on(mask, {blocks.heads, blocks.lines + 1}, ScalarType::Int),
               index = empty_on(mask, {max_listed}, ScalarType::Int),
               counts = empty_on(mask, {blocks.count()}, ScalarType::Int);
  block_lists_cuda(blocks, max_listed, integers(counts), integers(start), integers(index), stream_of(mask));
  give(values, start, index);
}

void random_blocks(StableIValue* values, uint64_t, uint64_t) {
  Stack stack{values};
  const Tensor like = stack.take<Tensor>();
  const int64_t n = stack.take<int64_t>(), reach = stack.take<int64_t>(), global_blocks = stack.take<int64_t>(),
                n_random = stack.take<int64_t>(), seed = stack.take<int64_t>();
  STD_TORCH_CHECK(n > 0 && n * n <= kMost && reach >= 0 && global_blocks >= 0 && global_blocks <= n && n_random >= 0 &&
                      n_random <= n,
                  "flash_models: random_blocks needs 1 to 46,340 blocks, no negative reach, and global and random "
                  "blocks of at most as many; got n ",
                  n, ", reach ", reach, ", global_blocks ", global_blocks, " and n_random ", n_random);
  const auto guard = on_device_of(like);
  const Tensor mask = zeros_on(like, {n, n}, ScalarType::Bool);
  random_blocks_cuda(static_cast<uint8_t*>(mask.mutable_data_ptr()), n, reach, global_blocks, n_random,
                     static_cast<uint32_t>(seed), stream_of(like));
  give(values, mask);
}

void work_items(StableIValue* values, uint64_t, uint64_t) {
  Stack stack{values};
  const Tensor start = stack.take<Tensor>();
  const int64_t max_blocks = stack.take<int64_t>(), max_partial = stack.take<int64_t>();
  STD_TORCH_CHECK(start.dim() == 2 && start.size(0) > 0 && start.size(1) > 1 &&
                      start.scalar_type() == ScalarType::Int && start.is_contiguous(),
                  "flash_models: work_items needs start, contiguous int32 (heads, lines + 1); got shape ",
                  shape_of(start));
  const int64_t heads = start.size(0), lines = start.size(1) - 1, rows = heads * lines + max_partial;
  STD_TORCH_CHECK(max_blocks > 0 && max_partial >= 0 && rows <= kMost,
                  "flash_models: work_items needs max_blocks of at least 1 and fewer than 2^31 items; got max_blocks ",
                  max_blocks, " and max_partial ", max_partial);
  const auto guard = on_device_of(start);
  const Tensor items = empty_on(start, {rows, 4}, ScalarType::Int);
  work_items_cuda(static_cast<const int32_t*>(start.const_data_ptr()), heads, lines, max_blocks, max_partial,
                  integers(items), stream_of(start));
  give(values, items);
}

}  // namespace
}  // namespace flash_models
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(flash_models, m) {
  m.def(
      "block_lists(Tensor mask, int max_listed, bool transposed, int reach, int global_blocks) -> (Tensor start, "
      "Tensor index)");
  m.def("random_blocks(Tensor like, int n, int reach, int global_blocks, int n_random, int seed) -> Tensor");
  m.def("work_items(Tensor start, int max_blocks, int max_partial) -> Tensor");
}

#ifdef FLASH_MODELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(flash_models, FLASH_MODELS_CUDA, m) {
  m.impl("block_lists", flash_models::block_lists);
  m.impl("random_blocks", flash_models::random_blocks);
  m.impl("work_items", flash_models::work_items);
}
#endif
