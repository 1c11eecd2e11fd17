// SPDX-License-Identifier: Apache-2.0
//
// What ends a sublayer: bias, dropout, the residual's sum and LayerNorm (arXiv 1607.06450), in one pass, and its
// backward in another. A row is held in the registers of some warps, kChunks chunks a thread; a CTA has several such
// groups. The backward's CTAs walk down the rows, so that a thread holds the sums over rows, the gradients of bias,
// weight and shift, in registers too.
#include <algorithm>

#include "column_sums.cuh"

namespace flash_models {
namespace {

constexpr int kMaxThreads = 256, kWarps = kMaxThreads / 32;

// How the threads of a CTA share rows.
template <int kChunks>
struct Groups {
  int warps, count;  // warps of a group, groups

  explicit Groups(const Rows& rows) {
    warps = static_cast<int>(ceil_div(rows.chunks(), 32 * kChunks));
    count = kWarps / warps;
  }

  FM_HOST_DEVICE int threads_of_one() const { return 32 * warps; }
  FM_HOST_DEVICE int threads() const { return count * threads_of_one(); }
  __device__ __forceinline__ int group() const { return threadIdx.x / threads_of_one(); }
  __device__ __forceinline__ int lane() const { return threadIdx.x % threads_of_one(); }
  // The thread's c-th chunk of its row.
  __device__ __forceinline__ int chunk(int c) const { return lane() + c * threads_of_one(); }

  // The sums of kValues values over the threads of a group. scratch: that many words a warp, of this call alone until
  // all threads have met again.
  template <int kValues>
  __device__ __forceinline__ void sum(float (&x)[kValues], float* scratch) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
#pragma unroll
      for (int i = 0; i < kValues; ++i) x[i] += __shfl_xor_sync(~0u, x[i], step);
    if (warps == 1) return;
    const int warp = threadIdx.x / 32, first = group() * warps;
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int i = 0; i < kValues; ++i) scratch[warp * kValues + i] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] = 0.0f;
    for (int other = first; other < first + warps; ++other)
#pragma unroll
      for (int i = 0; i < kValues; ++i) x[i] += scratch[other * kValues + i];
  }
};

__device__ __forceinline__ float* shared_floats() {
  return static_cast<float*>(__cvta_shared_to_generic(ptx::dynamic_shared()));
}

template <int kChunks>
__global__ void __launch_bounds__(kMaxThreads)
    norm_fwd(const __grid_constant__ NormForward n, const __grid_constant__ Groups<kChunks> groups) {
  const int chunks = n.rows.chunks();
  const int64_t row = int64_t{blockIdx.x} * groups.count + groups.group();
  const float columns = static_cast<float>(n.rows.columns);
  PackedChunk residual[kChunks], added[kChunks];
  float value[kChunks][kChunk];
  int chunk[kChunks];
  bool inside[kChunks];
  ptx::await_previous_kernel();
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    chunk[c] = groups.chunk(c);
    inside[c] = row < n.rows.count && chunk[c] < chunks;
    residual[c] = load_chunk(n.residual, row * chunks + chunk[c], inside[c]);
    added[c] = load_chunk(n.x, row * chunks + chunk[c], inside[c]);
  }
  float sum[1] = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    unpack(residual[c], n.residual.dtype, value[c]);
    if (n.x && inside[c]) {
      float x[kChunk], bias[kChunk];
      unpack(added[c], n.x.dtype, x);
      load_chunk(n.bias, chunk[c], bias);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] += bias[i];
      drop(n.dropout, row * chunks + chunk[c], x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) value[c][i] += x[i];
      if (n.keep_sum) store_chunk(n.kept, row * chunks + chunk[c], value[c]);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum[0] += value[c][i];
  }
  if (!n.weight) return;

  float* scratch = shared_floats();
  groups.sum(sum, scratch);
  const float mean = sum[0] / columns;
  float squares[1] = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      value[c][i] = inside[c] ? value[c][i] - mean : 0.0f;
      squares[0] += value[c][i] * value[c][i];
    }
  groups.sum(squares, scratch + kWarps);
  const float inverse = 1.0f / sqrtf(squares[0] / columns + n.eps);
  if (groups.lane() == 0 && inside[0]) {
    n.statistics[row] = mean;
    n.statistics[n.rows.count + row] = inverse;
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (!inside[c]) continue;
    float weight[kChunk], shift[kChunk];
    load_chunk(n.weight, chunk[c], weight);
    load_chunk(n.shift, chunk[c], shift);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) value[c][i] *= inverse;
    if (!n.keep_sum) store_chunk(n.kept, row * chunks + chunk[c], value[c]);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) value[c][i] = value[c][i] * weight[i] + shift[i];
    store_chunk(n.out, row * chunks + chunk[c], value[c]);
  }
}

// The sums of a CTA's groups, to its row of `partial`. By all threads; `shared` has a word for each column of a group.
template <int kChunks>
__device__ __forceinline__ void store_sums_of_groups(const Groups<kChunks>& groups, const float (&sum)[kChunks][kChunk],
                                                     int chunks, float* shared, float* partial) {
  float total[kChunks][kChunk];
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) total[c][i] = sum[c][i];
  for (int other = 1; other < groups.count; ++other) {  // each hands its sums to the first one
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float* mine = shared + groups.chunk(c) * kChunk;
      if (groups.group() == other) store_floats(mine, sum[c]);
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) total[c][i] += shared[groups.chunk(c) * kChunk + i];
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = groups.chunk(c);
    if (groups.group() == 0 && chunk < chunks) store_floats(partial + kChunk * chunk, total[c]);
  }
}

constexpr int ctas_per_sm(int chunks) { return chunks == 1 ? 3 : 1; }

template <int kChunks>
__global__ void __launch_bounds__(kMaxThreads, ctas_per_sm(kChunks))
    norm_bwd(const __grid_constant__ NormBackward n, const __grid_constant__ Groups<kChunks> groups) {
  ptx::let_next_kernel_begin();
  ptx::await_previous_kernel();
  const int chunks = n.rows.chunks();
  const float columns = static_cast<float>(n.rows.columns);
  float* scratch = shared_floats();
  float dbias[kChunks][kChunk] = {}, dweight[kChunks][kChunk] = {}, dshift[kChunks][kChunk] = {};
  int turn = 0;
  // all groups take as many turns, for they meet in each
  for (int64_t first = int64_t{blockIdx.x} * groups.count; first < n.rows.count;
       first += int64_t{gridDim.x} * groups.count, turn ^= 1) {
    const int64_t row = first + groups.group();
    const bool exists = row < n.rows.count;
    PackedChunk packed_normal[kChunks], packed_dout[kChunks], packed_dsum[kChunks];
    int64_t number[kChunks];
    bool inside[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = groups.chunk(c);
      number[c] = row * chunks + chunk;
      inside[c] = exists && chunk < chunks;
      packed_normal[c] = load_chunk(n.kept, number[c], inside[c] && n.dout);
      packed_dout[c] = load_chunk(n.dout, number[c], inside[c]);
      packed_dsum[c] = load_chunk(n.dsum, number[c], inside[c]);
    }
    float gradient[kChunks][kChunk] = {};
    if (n.dout) {
      const float mean = exists && n.kept_sum ? n.statistics[row] : 0.0f;
      const float inverse = exists ? n.statistics[n.rows.count + row] : 0.0f;
      float normal[kChunks][kChunk], along[2] = {};  // sums over the row of the gradient, and of it times normal
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        float weight[kChunk];
        load_chunk(n.weight, inside[c] ? number[c] - row * chunks : 0, weight);
        unpack(packed_normal[c], n.kept.dtype, normal[c]);
        unpack(packed_dout[c], n.dout.dtype, gradient[c]);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (n.kept_sum) normal[c][i] = inside[c] ? (normal[c][i] - mean) * inverse : 0.0f;
          dweight[c][i] += gradient[c][i] * normal[c][i];
          dshift[c][i] += gradient[c][i];
          gradient[c][i] *= weight[i];
          along[0] += gradient[c][i];
          along[1] += gradient[c][i] * normal[c][i];
        }
      }
      groups.sum(along, scratch + turn * 2 * kWarps);
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
          gradient[c][i] = (gradient[c][i] - along[0] / columns - normal[c][i] * (along[1] / columns)) * inverse;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (!inside[c]) continue;
      float dsum[kChunk];
      unpack(packed_dsum[c], n.dsum.dtype, dsum);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) gradient[c][i] += dsum[i];
      if (n.dresidual) store_chunk(n.dresidual, number[c], gradient[c]);
      if (!n.dx) continue;
      drop(n.dropout, number[c], gradient[c]);
      store_chunk(n.dx, number[c], gradient[c]);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) dbias[c][i] += gradient[c][i];
    }
  }
  float* shared = scratch + 4 * kWarps;
  float* partial = n.partial + int64_t{blockIdx.x} * n.rows.columns;
  const int64_t quantity = int64_t{gridDim.x} * n.rows.columns;
  if (n.has_bias) {
    store_sums_of_groups(groups, dbias, chunks, shared, partial);
    partial += quantity;
  }
  if (!n.dout) return;
  store_sums_of_groups(groups, dweight, chunks, shared, partial);
  store_sums_of_groups(groups, dshift, chunks, shared, partial + quantity);
}

// Chunks a thread, as few as the columns allow.
template <typename Function>
auto dispatch_chunks(const Rows& rows, Function&& fn) {
  static_assert(4 * kMaxThreads * kChunk == kMaxNormColumns);
  if (rows.chunks() <= kMaxThreads) return fn.template operator()<1>();
  return rows.chunks() <= 2 * kMaxThreads ? fn.template operator()<2>() : fn.template operator()<4>();
}

}  // namespace

int64_t norm_bwd_parts_cuda(const Rows& rows) {
  return dispatch_chunks(rows, [&]<int kChunks>() {
    const Groups<kChunks> groups(rows);
    const int64_t resident = int64_t{multiprocessors()} * (ctas_per_sm(kChunks) * kMaxThreads / groups.threads());
    return std::min(ceil_div(rows.count, groups.count), resident);
  });
}

void norm_fwd_cuda(const NormForward& n, void* stream) {
  dispatch_chunks(n.rows, [&]<int kChunks>() {
    const Groups<kChunks> groups(n.rows);
    launch<norm_fwd<kChunks>, 4 * 2 * kWarps, true>("norm_fwd", ceil_div(n.rows.count, groups.count), groups.threads(),
                                                    stream, n, groups);
  });
}

void norm_bwd_cuda(const NormBackward& n, void* stream) {
  const int64_t parts = norm_bwd_parts_cuda(n.rows);
  dispatch_chunks(n.rows, [&]<int kChunks>() {
    const Groups<kChunks> groups(n.rows);
    launch<norm_bwd<kChunks>, 4 * (4 * kWarps + kMaxThreads * kChunks * kChunk), true>(
        "norm_bwd", parts, groups.threads(), stream, n, groups);
  });
  if (n.quantities > 0) launch_column_sums(n.partial, n.sums, n.quantities, parts, n.rows.columns, stream);
}

}  // namespace flash_models
