// SPDX-License-Identifier: Apache-2.0
//
// kernels/ampere/launch.cuh without a GPU: runs the blocks of a grid one after the other.
#pragma once

#include "ampere/ptx.cuh"

namespace flash_models {

inline int compute_capability() { return FM_EMULATED_CAPABILITY; }
inline int multiprocessors() { return 2; }  // few, so that CTAs take several tiles

template <auto kKernel, int kShared, bool kEarly = false, typename... Arguments>
void launch(const char*, int64_t blocks, int threads, void*, const Arguments&... arguments) {
  if (threads > emulation::kMaxThreads || kShared > static_cast<int>(sizeof(emulation::shared_memory)))
    throw std::runtime_error("the emulation is too small for this launch");
  emulation::grid = static_cast<int>(blocks);
  emulation::body = [&] { kKernel(arguments...); };
  for (int64_t block = 0; block < blocks; ++block) {
    emulation::block = static_cast<int>(block);
    emulation::run_block(threads);
    for (const auto& thread : ptx::copies)
      if (!thread.empty()) throw std::runtime_error("a thread ended with copies in flight");
  }
}

}  // namespace flash_models
