// SPDX-License-Identifier: Apache-2.0
//
// Sums over rows, as gradients of biases and norms are: each CTA of a kernel leaves a row of partial sums, this adds
// them up. In a fixed order, so that the same call gives the same bits.
#pragma once

#include "chunk.cuh"
#include "numbers.h"

namespace flash_models {
namespace {

constexpr int kSumThreads = 256, kSumLanes = 8, kSumGroups = kSumThreads / kSumLanes;
constexpr int kSumColumns = 4 * kSumLanes;  // of a CTA: 128 bytes, which a group of threads reads of a row

// partial (quantities, parts, columns), sums (quantities, columns).
__global__ void __launch_bounds__(kSumThreads)
    column_sums(const float* partial, float* sums, int64_t parts, int64_t columns) {
  float4* shared = static_cast<float4*>(__cvta_shared_to_generic(ptx::dynamic_shared()));
  const int64_t strips = ceil_div(columns, kSumColumns), quantity = blockIdx.x / strips;
  const int lane = threadIdx.x % kSumLanes, group = threadIdx.x / kSumLanes;
  const int64_t column = blockIdx.x % strips * kSumColumns + 4 * lane;
  float4 sum{};
  ptx::await_previous_kernel();
  if (column < columns)
    for (int64_t part = group; part < parts; part += kSumGroups) {
      const float4 x = *reinterpret_cast<const float4*>(partial + (quantity * parts + part) * columns + column);
      sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
    }
  shared[threadIdx.x] = sum;
  for (int half = kSumGroups / 2; half > 0; half /= 2) {
    __syncthreads();
    if (group >= half) continue;
    const float4 x = shared[threadIdx.x + half * kSumLanes], y = shared[threadIdx.x];
    shared[threadIdx.x] = {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
  }
  if (group == 0 && column < columns)
    *reinterpret_cast<float4*>(sums + quantity * columns + column) = shared[threadIdx.x];
}

void launch_column_sums(const float* partial, float* sums, int quantities, int64_t parts, int64_t columns,
                        void* stream) {
  launch<column_sums, kSumThreads * 16, true>("column_sums", quantities * ceil_div(columns, kSumColumns), kSumThreads,
                                              stream, partial, sums, parts, columns);
}

}  // namespace
}  // namespace flash_models
