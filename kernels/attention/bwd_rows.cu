// SPDX-License-Identifier: Apache-2.0
//
// First step of the backward pass, on every GPU: what its kernels need of each row. delta = rowsum(dout * out), and
// shift = lse * log2(e), +inf for a row without a key, so that exp2(score * log2(e) - shift) is a probability, or 0.
#include "dispatch.cuh"
#include "softmax.cuh"

namespace flash_models {
namespace {

constexpr int kThreads = 128;

__host__ __device__ constexpr int lanes_of_row(int dim) { return dim <= 32 ? 4 : dim <= 64 ? 8 : 16; }

// lanes_of_row() lanes a row, 16 bytes each.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_rows(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionGradients g) {
  constexpr int kLanes = lanes_of_row(kDim);
  const int64_t item = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kLanes;
  const int dim = 8 * (threadIdx.x % kLanes);
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t rows = packed ? p.total_q : p.seqlen_q;
  const bool valid = item < rows * p.heads * (packed ? 1 : p.batch);
  const int64_t row = item % rows, head = item / rows % p.heads, batch = item / rows / p.heads;
  const T* out = static_cast<const T*>(p.out.data) + batch * p.out.batch + row * p.out.seq + head * p.out.head;
  const T* dout = static_cast<const T*>(g.dout.data) + batch * g.dout.batch + row * g.dout.seq + head * g.dout.head;
  float sum = 0.0f;
  if (valid && dim < p.head_dim) {
    const uint4 a = *reinterpret_cast<const uint4*>(out + dim), b = *reinterpret_cast<const uint4*>(dout + dim);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum +=
          static_cast<float>(reinterpret_cast<const T*>(&a)[i]) * static_cast<float>(reinterpret_cast<const T*>(&b)[i]);
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (valid && dim == 0) {
    const float lse = p.lse[item];
    g.delta[item] = sum;
    g.shift[item] = lse == -INFINITY ? INFINITY : lse * kLog2e;
  }
}

}  // namespace

void attention_bwd_rows(const AttentionProblem& p, const AttentionGradients& g) {
  const int64_t rows = (p.cu_seqlens_q != nullptr ? p.total_q : p.batch * p.seqlen_q) * p.heads;
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    launch("attention_bwd_rows", attention_bwd_rows<T, kDim>, ceil_div(rows * lanes_of_row(kDim), kThreads), kThreads,
           0, p.stream, p, g);
  });
}

}  // namespace flash_models
