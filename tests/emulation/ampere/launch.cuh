// SPDX-License-Identifier: Apache-2.0
//
// kernels/ampere/launch.cuh without a GPU: runs the clusters of a grid one after the other.
#pragma once

#include "ampere/ptx.cuh"

namespace flash_models {

inline int compute_capability() { return FM_EMULATED_CAPABILITY; }
inline int l2_bytes() { return 0; }
inline int multiprocessors() { return 2; }  // few, so that CTAs take several tiles

template <auto kKernel, int kShared, bool kEarly = false, typename... Arguments>
void launch_clusters(const char*, int64_t blocks, int cluster, int threads, void*, const Arguments&... arguments) {
  if (threads > emulation::kMaxThreads || cluster > emulation::kMaxCluster || blocks % cluster != 0 ||
      kShared > static_cast<int>(sizeof(*emulation::shared_memory)))
    throw std::runtime_error("the emulation is too small for this launch");
  emulation::grid = static_cast<int>(blocks);
  emulation::body = [&] { kKernel(arguments...); };
  for (int64_t block = 0; block < blocks; block += cluster) {
    emulation::first_block = static_cast<int>(block);
    emulation::run_cluster(cluster, threads);
    for (const auto& thread : ptx::copies)
      if (!thread.empty()) throw std::runtime_error("a thread ended with copies in flight");
  }
}

template <auto kKernel, int kShared>
int clusters_at_once(int cluster, int) {
  return compute_capability() == 90 ? multiprocessors() / cluster : 0;
}

template <auto kKernel, int kShared, bool kEarly = false, typename... Arguments>
void launch(const char* name, int64_t blocks, int threads, void* stream, const Arguments&... arguments) {
  launch_clusters<kKernel, kShared, kEarly>(name, blocks, 1, threads, stream, arguments...);
}

}  // namespace flash_models
