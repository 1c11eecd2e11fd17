// SPDX-License-Identifier: Apache-2.0
//
// Logits of the vocabulary become, in place, the gradient of the summed cross-entropy: softmax(logits) - one-hot. A CTA
// takes a row: it reads it for the largest logit and the sum of exponentials, and again, mostly from the L2 cache, for
// the gradient.
#include "chunk.cuh"
#include "numbers.h"

namespace flash_models {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// sum of exp2(x - largest) over what was added; of nothing, (-inf, 0)
struct OnlineSum {
  float largest = -INFINITY, sum = 0.0f;

  __device__ __forceinline__ void add(const OnlineSum& other) {
    const float now = fmaxf(largest, other.largest);
    if (now == -INFINITY) return;
    sum = sum * ptx::exp2_approx(largest - now) + other.sum * ptx::exp2_approx(other.largest - now);
    largest = now;
  }
};

// Calls act(chunk, x) for the chunks of a row that are this thread's, x: logits * log2(e), -inf for what is no word.
// Two loads are under way together.
template <typename Act>
__device__ __forceinline__ void for_logits(const SoftmaxGradient& s, int64_t row, int first, int step, Act&& act) {
  constexpr int kTogether = 2;
  const int chunks = s.rows.chunks();
  for (; first < chunks; first += kTogether * step) {
    PackedChunk packed[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int chunk = first + j * step;
      packed[j] = load_chunk(s.logits, row * chunks + chunk, chunk < chunks);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int chunk = first + j * step;
      if (chunk >= chunks) break;
      float x[kChunk];
      unpack(packed[j], s.logits.dtype, x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = kChunk * chunk + i < s.vocabulary ? x[i] * kLog2e : -INFINITY;
      act(chunk, x);
    }
  }
}

__global__ void __launch_bounds__(kThreads) softmax_gradient(const __grid_constant__ SoftmaxGradient s) {
  const int64_t row = blockIdx.x, given = s.labels[row];
  const int64_t label = given < s.vocabulary ? given : -1;
  OnlineSum total;
  for_logits(s, row, threadIdx.x, kThreads, [&](int, const float (&x)[kChunk]) {
    OnlineSum here;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) here.largest = fmaxf(here.largest, x[i]);
    if (here.largest == -INFINITY) return;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) here.sum += ptx::exp2_approx(x[i] - here.largest);
    total.add(here);
  });
  OnlineSum* warps = static_cast<OnlineSum*>(__cvta_shared_to_generic(ptx::dynamic_shared()));
  float* chosen = reinterpret_cast<float*>(warps + kWarps);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    OnlineSum other;
    other.largest = __shfl_xor_sync(~0u, total.largest, step);
    other.sum = __shfl_xor_sync(~0u, total.sum, step);
    total.add(other);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
  if (threadIdx.x == 0 && label >= 0) {  // before anyone writes
    float x[kChunk];
    load_chunk(s.logits, row * s.rows.chunks() + label / kChunk, x);
    for (int i = 0; i < kChunk; ++i)
      if (label % kChunk == i) *chosen = x[i] * kLog2e;
  }
  __syncthreads();
  total = warps[0];
  for (int warp = 1; warp < kWarps; ++warp) total.add(warps[warp]);
  const float log_sum = total.largest + __log2f(total.sum);
  if (threadIdx.x == 0) s.losses[row] = label >= 0 ? (log_sum - *chosen) * kLn2 : 0.0f;
  for_logits(s, row, threadIdx.x, kThreads, [&](int chunk, float (&x)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float one = kChunk * chunk + i == label ? 1.0f : 0.0f;
      x[i] = label >= 0 ? ptx::exp2_approx(x[i] - log_sum) - one : 0.0f;
    }
    store_chunk(s.logits, row * s.rows.chunks() + chunk, x);
  });
}

}  // namespace

void softmax_gradient_cuda(const SoftmaxGradient& s, void* stream) {
  launch<softmax_gradient, kWarps * 8 + 16>("softmax_gradient", s.rows.count, kThreads, stream, s);
}

}  // namespace flash_models
