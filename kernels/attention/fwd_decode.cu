// SPDX-License-Identifier: Apache-2.0
//
// Forward pass for few queries against many keys, as in a step of generation with a cache. Nothing can be reused, so
// the time is that of reading K and V once, and every multiprocessor has to read: the keys of one query are split over
// CTAs, and a second launch combines what they leave (arXiv 2205.14135, Section 3.1, applied across CTAs).
//
//   CTA         128 threads, a part of the keys of one (sequence, head, query)
//   group       kLanes threads with 8 dimensions each: a row of K and V; kUnroll rows are at work, as many under way
//   partial     [item][split][kDim + 2] floats: sum of exp2(score - max) v, that sum without v, max; log2 units
#include <algorithm>

#include "dispatch.cuh"
#include "softmax.cuh"

namespace flash_models {
namespace {

constexpr int kThreads = 128, kCtasPerSm = 4, kUnroll = 4, kMaxQueries = 4, kMinKeys = 256;  // of a CTA
constexpr int kCombiningWarps = 16;

// A query's softmax over some keys, 8 dimensions of it.
struct Partial {
  float acc[8] = {}, sum = 0.0f, max = -INFINITY;

  __device__ __forceinline__ void rescale(float new_max) {
    const float factor = max == -INFINITY ? 0.0f : ptx::exp2_approx(max - new_max);
#pragma unroll
    for (float& x : acc) x *= factor;
    sum *= factor;
    max = new_max;
  }

  __device__ __forceinline__ void add(const Partial& other) {
    const float factor = other.max == -INFINITY ? 0.0f : ptx::exp2_approx(other.max - fmaxf(max, other.max));
    rescale(fmaxf(max, other.max));
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i] += factor * other.acc[i];
    sum += factor * other.sum;
  }

  // Adds what the lanes at this distance have.
  __device__ __forceinline__ void add_lanes(int distance) {
    Partial other;
#pragma unroll
    for (int i = 0; i < 8; ++i) other.acc[i] = __shfl_xor_sync(~0u, acc[i], distance);
    other.sum = __shfl_xor_sync(~0u, sum, distance);
    other.max = __shfl_xor_sync(~0u, max, distance);
    add(other);
  }
};

template <typename T>
__device__ __forceinline__ void unpack(float (&x)[8], const uint4& packed) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(reinterpret_cast<const T*>(&packed)[i]);
}

// The (sequence, head, query) of an item of a launch.
struct Item {
  const int query, head, batch;
  const Sequence s;

  __device__ __forceinline__ Item(const AttentionProblem& p, int number)
      : query(number % static_cast<int>(p.seqlen_q)),
        head(number / static_cast<int>(p.seqlen_q) % static_cast<int>(p.heads)),
        batch(number / static_cast<int>(p.seqlen_q * p.heads)),
        s(sequence_of(p, batch)) {}

  __device__ __forceinline__ void store_lse(const AttentionProblem& p, float sum, float max) const {
    p.lse[lse_offset(p, s, batch, head) + query] = sum == 0.0f ? -INFINITY : (max + __log2f(sum)) * kLn2;
  }
  // Its row of q or out.
  template <typename T>
  __device__ __forceinline__ T* row(const View& v) const {
    return static_cast<T*>(v.data) + query_offset(v, s, batch, head) + query * v.seq;
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    attention_fwd_decode(const __grid_constant__ AttentionProblem p, int splits) {
  constexpr int kLanes = lanes_of_row(kDim), kGroups = kThreads / kLanes;
  ptx::let_next_kernel_begin();
  const int number = blockIdx.x / splits, split = blockIdx.x % splits, warp = threadIdx.x / 32;
  const int group = threadIdx.x / kLanes, dim = 8 * (threadIdx.x % kLanes);
  const Item item(p, number);
  const Visible visible(p, item.s);
  const int last = max(visible.lo, min(visible.hi, item.query + visible.diagonal + 1));
  const int share = (last - visible.lo + splits - 1) / splits;
  const int begin = visible.lo + split * share, end = min(begin + share, last);
  const bool has_dim = dim < p.head_dim;

  float q[8] = {};
  if (has_dim) unpack<T>(q, *reinterpret_cast<const uint4*>(item.row<const T>(p.q) + dim));
  const T* k = static_cast<const T*>(p.k.data) + key_offset(p.k, item.s, item.batch, item.head) + dim;
  const T* v = static_cast<const T*>(p.v.data) + key_offset(p.v, item.s, item.batch, item.head) + dim;

  uint4 rows_k[kUnroll], rows_v[kUnroll];
  auto load = [&](int key0) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t key = key0 + u * kGroups;
      rows_k[u] = rows_v[u] = {};
      if (key < end && has_dim) {
        rows_k[u] = ptx::load_once_16(k + key * p.k.seq);
        rows_v[u] = ptx::load_once_16(v + key * p.v.seq);
      }
    }
  };

  Partial result;
  load(begin + group);
  for (int key0 = begin + group; key0 - group < end; key0 += kUnroll * kGroups) {
    uint4 now_k[kUnroll], now_v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) now_k[u] = rows_k[u], now_v[u] = rows_v[u];
    load(key0 + kUnroll * kGroups);  // under way while these are at work
    float scores[kUnroll], top = result.max, x[8];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      unpack<T>(x, now_k[u]);
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) dot = fmaf(q[i], x[i], dot);
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2) dot += __shfl_xor_sync(~0u, dot, distance);
      scores[u] = key0 + u * kGroups < end ? dot * p.scale_log2 : -INFINITY;
      top = fmaxf(top, scores[u]);
    }
    result.rescale(top);
    const float shift = top == -INFINITY ? 0.0f : top;  // a group may have no key yet; a NaN among scores stays one
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float probability = ptx::exp2_approx(scores[u] - shift);
      unpack<T>(x, now_v[u]);
      result.sum += probability;
#pragma unroll
      for (int i = 0; i < 8; ++i) result.acc[i] = fmaf(probability, x[i], result.acc[i]);
    }
  }

#pragma unroll
  for (int distance = kLanes; distance < 32; distance *= 2) result.add_lanes(distance);
  Partial* warps = static_cast<Partial*>(__cvta_shared_to_generic(ptx::dynamic_shared()));
  if (threadIdx.x % 32 < kLanes) warps[warp * kLanes + threadIdx.x % 32] = result;
  __syncthreads();
  if (threadIdx.x >= kLanes) return;
#pragma unroll
  for (int other = 1; other < kThreads / 32; ++other) result.add(warps[other * kLanes + threadIdx.x]);

  if (splits > 1) {
    float* partial = p.partial + int64_t{blockIdx.x} * (kDim + 2);
    if (dim < kDim)  // at 96 a group has lanes to spare
#pragma unroll
      for (int i = 0; i < 8; ++i) partial[dim + i] = result.acc[i];
    if (dim == 0) partial[kDim] = result.sum, partial[kDim + 1] = result.max;
  } else {
    const float factor = result.sum == 0.0f ? 0.0f : 1.0f / result.sum;
    if (has_dim)
#pragma unroll
      for (int i = 0; i < 8; ++i) item.row<T>(p.out)[dim + i] = static_cast<T>(result.acc[i] * factor);
    if (dim == 0) item.store_lse(p, result.sum, result.max);
  }
}

// One CTA an item. A warp adds up some of the splits, several reads under way, then the warps' sums are added.
template <typename T, int kDim>
__global__ void __launch_bounds__(32 * kCombiningWarps)
    attention_fwd_decode_combine(const __grid_constant__ AttentionProblem p, int splits) {
  constexpr int kRow = kDim + 2, kPerLane = kDim / 32;
  const Item item(p, blockIdx.x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* partial = p.partial + int64_t{blockIdx.x} * splits * kRow;
  float top = -INFINITY, sum = 0.0f, out[kPerLane] = {};
  ptx::await_previous_kernel();
  for (int split = lane; split < splits; split += 32) top = fmaxf(top, partial[split * kRow + kDim + 1]);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
  const float shift = top == -INFINITY ? 0.0f : top;
#pragma unroll 4
  for (int split = warp; split < splits; split += kCombiningWarps) {
    const float* part = partial + split * kRow;
    const float factor = ptx::exp2_approx(part[kDim + 1] - shift);
    sum = fmaf(factor, part[kDim], sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) out[i] = fmaf(factor, part[lane + 32 * i], out[i]);
  }

  float* warps = static_cast<float*>(__cvta_shared_to_generic(ptx::dynamic_shared()));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) warps[warp * kRow + lane + 32 * i] = out[i];
  if (lane == 0) warps[warp * kRow + kDim] = sum;
  __syncthreads();
  const int dim = threadIdx.x;
  if (dim >= kDim) return;
  float total = 0.0f, all = 0.0f;
#pragma unroll
  for (int other = 0; other < kCombiningWarps; ++other) {
    total += warps[other * kRow + dim];
    all += warps[other * kRow + kDim];
  }
  if (dim < p.head_dim) item.row<T>(p.out)[dim] = static_cast<T>(all == 0.0f ? 0.0f : total / all);
  if (dim == 0) item.store_lse(p, all, top);
}

int64_t items_of(const AttentionProblem& p) { return p.batch * p.heads * p.seqlen_q; }

// Enough CTAs to keep every multiprocessor reading, with enough keys each to be worth starting.
int64_t splits_of(const AttentionProblem& p) {
  return std::min(ceil_div(kCtasPerSm * multiprocessors(), items_of(p)), std::max<int64_t>(1, p.seqlen_k / kMinKeys));
}

}  // namespace

bool takes_decode(const AttentionProblem& p) {
  return p.seqlen_q <= kMaxQueries && p.cu_seqlens_q == nullptr && p.rows.start == nullptr && p.rng_state == nullptr;
}

int64_t decode_scratch(const AttentionProblem& p) {
  if (items_of(p) == 0 || splits_of(p) == 1) return 0;
  return items_of(p) * splits_of(p) * (padded_dim(p.head_dim) + 2);
}

void attention_fwd_decode(const AttentionProblem& p) {
  const int splits = static_cast<int>(splits_of(p));
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    if constexpr (!kDropout) {
      constexpr int kPartialBytes = kThreads * static_cast<int>(sizeof(Partial)),
                    kRowBytes = 4 * kCombiningWarps * (kDim + 2);
      launch<attention_fwd_decode<T, kDim>, kPartialBytes>("attention_fwd_decode", items_of(p) * splits, kThreads,
                                                           p.stream, p, splits);
      if (splits > 1)
        launch<attention_fwd_decode_combine<T, kDim>, kRowBytes, true>("attention_fwd_decode_combine", items_of(p),
                                                                       32 * kCombiningWarps, p.stream, p, splits);
    }
  });
}

}  // namespace flash_models
