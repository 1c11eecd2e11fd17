// SPDX-License-Identifier: Apache-2.0
//
// Starting a kernel. Knows nothing of attention.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace flash_models {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("flash_models: ") + what + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

struct Device {
  int compute_capability;  // 10 * major + minor
  int multiprocessors, l2_bytes;
};

// All of this machine, asked once.
inline const std::vector<Device>& devices() {
  static const std::vector<Device> all = [] {
    int count = 0;
    check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    std::vector<Device> found;
    for (int device = 0; device < count; ++device)
      found.push_back({10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
                           device_attribute(cudaDevAttrComputeCapabilityMinor, device),
                       device_attribute(cudaDevAttrMultiProcessorCount, device),
                       device_attribute(cudaDevAttrL2CacheSize, device)});
    return found;
  }();
  return all;
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline int compute_capability() { return devices()[current_device()].compute_capability; }
inline int multiprocessors() { return devices()[current_device()].multiprocessors; }
inline int l2_bytes() { return devices()[current_device()].l2_bytes; }

// Lets a kernel have more dynamic shared memory than every kernel may, which each device wants to be told once.
template <auto kKernel, int kShared>
void allow_shared(const char* name) {
  static std::vector<std::atomic<bool>> allowed(devices().size());
  std::atomic<bool>& here = allowed[current_device()];
  if (here) return;
  check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), name);
  here = true;
}

inline cudaLaunchAttribute in_clusters(int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  return attribute;
}

// One-dimensional launch with `kShared` bytes of dynamic shared memory, of clusters of so many blocks, on Hopper
// ("Thread Block Clusters"). kEarly: on Hopper it may begin while the kernel before it in the stream ends
// ("Programmatic Dependent Launch"), for what that one wrote it waits itself, with ptx::await_previous_kernel. Later
// GPUs run what was compiled for Ampere, in which that is nothing.
template <auto kKernel, int kShared, bool kEarly = false, typename... Arguments>
void launch_clusters(const char* name, int64_t blocks, int cluster, int threads, void* stream,
                     const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7FFFFFFF)
    throw std::runtime_error(std::string("flash_models: ") + name + " needs more than 2^31 - 1 thread blocks");
  if constexpr (kShared > 48 * 1024) allow_shared<kKernel, kShared>(name);
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = threads;
  config.dynamicSmemBytes = kShared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (kEarly && compute_capability() == 90) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) attributes[config.numAttrs++] = in_clusters(cluster);
  check_cuda(cudaLaunchKernelEx(&config, kKernel, arguments...), name);
}

template <auto kKernel, int kShared, bool kEarly = false, typename... Arguments>
void launch(const char* name, int64_t blocks, int threads, void* stream, const Arguments&... arguments) {
  launch_clusters<kKernel, kShared, kEarly>(name, blocks, 1, threads, stream, arguments...);
}

// Clusters of so many blocks, at most 8, that this device runs at the same time: not always as many as its
// multiprocessors would have room for, since a cluster lies within one of the groups they form. 0 before Hopper.
template <auto kKernel, int kShared>
int clusters_at_once(int cluster, int threads) {
  static std::vector<std::atomic<int>> known(9 * devices().size());  // and 1; 0: to be asked for
  std::atomic<int>& here = known[9 * current_device() + cluster];
  if (here != 0) return here - 1;
  cudaLaunchAttribute attribute = in_clusters(cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = cluster;
  config.blockDim = threads;
  config.dynamicSmemBytes = kShared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (compute_capability() == 90)
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config), "cudaOccupancyMaxActiveClusters");
  here = clusters + 1;
  return clusters;
}

}  // namespace flash_models
