// SPDX-License-Identifier: Apache-2.0
//
// First step of the backward pass, on every GPU: what its kernels need of each row. delta = rowsum(dout * out), and
// shift = lse * log2(e), +inf for a row without a key, so that exp2(score * log2(e) - shift) is a probability, or 0.
// What lies in a tile past the end of its sequence is such a row. For Hopper both once more, as what products start
// from (starts.cuh). And the zeros that dQ and tickets start with: written here they cost no launch, and the time of
// reading hides theirs.
#include "dispatch.cuh"
#include "row_tiles.cuh"
#include "softmax.cuh"
#include "starts.cuh"

namespace flash_models {
namespace {

constexpr int kThreads = 128;

// The sequence that owns tile `tile` of a head, by where the sequences' tiles start (row_tiles.cuh).
__device__ __forceinline__ int sequence_of_tile(const AttentionProblem& p, int tile) {
  if (p.cu_seqlens_q == nullptr) return tile / static_cast<int>(row_tiles_of_sequence(p));
  int first = 0, last = static_cast<int>(p.batch) - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    const int start = static_cast<int>(clamp_to(p.cu_seqlens_q[middle], 0, p.total_q)) / kRowTile + middle;
    start <= tile ? first = middle : last = middle - 1;
  }
  return first;
}

// lanes_of_row() lanes a row, 16 bytes each.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_rows(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionGradients g) {
  constexpr int kLanes = lanes_of_row(kDim), kRows = kThreads / kLanes;
  ptx::let_next_kernel_begin();
  static_assert(kRowTile % kRows == 0);
  const int64_t item = blockIdx.x * int64_t{kRows} + threadIdx.x / kLanes;
  const int tiles = static_cast<int>(row_tiles(p)), number = static_cast<int>(blockIdx.x / (kRowTile / kRows));
  const int head = number / tiles, batch = sequence_of_tile(p, number % tiles), dim = 8 * (threadIdx.x % kLanes);
  const Sequence s = sequence_of(p, batch);
  const int64_t row = item - padded_row(p, s, batch, head);
  const bool valid = head < p.heads && row < s.q_len;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < p.zeros; i += gridDim.x * int64_t{kThreads})
    p.ticket[i] = 0;
  if (g.dq_sum != nullptr && dim < kDim) {
    float4* dq_sum = reinterpret_cast<float4*>(g.dq_sum + item * kDim + dim);
    dq_sum[0] = dq_sum[1] = {};
  }
  float sum = 0.0f;
  if (valid && dim < p.head_dim) {
    const T* out = static_cast<const T*>(p.out.data) + query_offset(p.out, s, batch, head) + row * p.out.seq;
    const T* dout = static_cast<const T*>(g.dout.data) + query_offset(g.dout, s, batch, head) + row * g.dout.seq;
    const uint4 a = *reinterpret_cast<const uint4*>(out + dim), b = *reinterpret_cast<const uint4*>(dout + dim);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum +=
          static_cast<float>(reinterpret_cast<const T*>(&a)[i]) * static_cast<float>(reinterpret_cast<const T*>(&b)[i]);
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (dim == 0) {
    const float lse = valid ? p.lse[lse_offset(p, s, batch, head) + row] : -INFINITY;
    g.delta[item] = sum;
    g.shift[item] = lse == -INFINITY ? INFINITY : lse * kLog2e;
    // Finite where shift is not: a product adds the parts of one number times 1 and those of the other times 0.
    if (g.starts != nullptr)
      static_cast<Starts*>(g.starts)[item] = starts_of(lse == -INFINITY ? -1e38f : -lse * kLog2e / p.scale_log2, -sum);
  }
}

}  // namespace

void attention_bwd_rows(const AttentionProblem& p, const AttentionGradients& g) {
  if (p.total_q == 0) return;
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    launch<attention_bwd_rows<T, kDim>, 0>("attention_bwd_rows", padded_rows(p) * lanes_of_row(kDim) / kThreads,
                                           kThreads, p.stream, p, g);
  });
}

}  // namespace flash_models
