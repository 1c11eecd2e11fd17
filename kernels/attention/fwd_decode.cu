// SPDX-License-Identifier: Apache-2.0
//
// Forward pass for few queries against many keys, as in a step of generation with a cache. Nothing can be reused, so
// the time is that of reading K and V once, and every multiprocessor has to read: the keys of one query are split over
// CTAs (arXiv 2205.14135, Section 3.1, applied across CTAs). On Hopper the CTAs of a cluster send what they have to the
// shared memory of the first one, which combines it; a second launch, which costs as much as 10 MB of keys, is for what
// more than a cluster is given, and for other GPUs.
//
//   CTA         512 threads, a part of the keys of one (sequence, head, query)
//   group       kLanes threads with 8 dimensions each: a row of K and V; kUnroll rows are at work, as many under way
//   row         [kDim + 2] floats: sum of exp2(score - max) v, that sum without v, max; log2 units. Of a warp and of a
//               CTA in shared memory, the latter in that of the cluster's first, of a cluster in p.partial
//               [item][cluster]
#include <algorithm>

#include "dispatch.cuh"
#include "softmax.cuh"

namespace flash_models {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kUnroll = 4, kMaxQueries = 4, kMinKeys = 256;  // of a CTA
constexpr int kMaxCluster = 8;

// How the keys of an item are split: over the CTAs of so many clusters.
struct Split {
  int cluster, clusters;

  __host__ __device__ int ctas() const { return cluster * clusters; }
};

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

  // Adds what the lanes at this distance have.
  __device__ __forceinline__ void add_lanes(int distance) {
    rescale(fmaxf(max, __shfl_xor_sync(~0u, max, distance)));
#pragma unroll
    for (float& x : acc) x += __shfl_xor_sync(~0u, x, distance);
    sum += __shfl_xor_sync(~0u, sum, distance);
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

  __device__ __forceinline__ Item(const AttentionProblem& p, unsigned number)
      : query(number % static_cast<unsigned>(p.seqlen_q)),
        head(number / static_cast<unsigned>(p.seqlen_q) % static_cast<unsigned>(p.heads)),
        batch(number / static_cast<unsigned>(p.seqlen_q * p.heads)),
        s(unpacked_sequence_of(p, batch)) {}

  // Its row of q or out.
  template <typename T>
  __device__ __forceinline__ T* row(const View& v) const {
    return static_cast<T*>(v.data) + query_offset(v, s, batch, head) + query * v.seq;
  }
};

// One dimension of a row of partial results, added up over several, of which `read(i, j)` gives element j of the i-th.
struct Element {
  float acc = 0.0f, sum = 0.0f, max = -INFINITY;

  template <int kDim, int kMost, typename Read>
  static __device__ __forceinline__ Element add_up(int count, int dim, Read read) {
    Element total;
    for (int first = 0; first < count; first += kMost) {
      float acc[kMost], sum[kMost], max[kMost], top = total.max;
#pragma unroll
      for (int i = 0; i < kMost; ++i) {  // all reads under way
        const bool exists = first + i < count;
        acc[i] = exists ? read(first + i, dim) : 0.0f;
        sum[i] = exists ? read(first + i, kDim) : 0.0f;
        max[i] = exists ? read(first + i, kDim + 1) : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kMost; ++i) top = fmaxf(top, max[i]);
      const float shift = top == -INFINITY ? 0.0f : top, before = ptx::exp2_approx(total.max - shift);
      total = {before * total.acc, before * total.sum, top};
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const float factor = ptx::exp2_approx(max[i] - shift);
        total.acc = fmaf(factor, acc[i], total.acc);
        total.sum = fmaf(factor, sum[i], total.sum);
      }
    }
    return total;
  }

  // Calls `write(j, x)` for its elements of a row.
  template <int kDim, typename Write>
  __device__ __forceinline__ void store_row(int dim, Write write) const {
    write(dim, acc);
    if (dim == 0) write(kDim, sum), write(kDim + 1, max);
  }

  template <typename T>
  __device__ __forceinline__ void store_result(const AttentionProblem& p, const Item& item, int dim) const {
    if (dim < p.head_dim) item.row<T>(p.out)[dim] = static_cast<T>(sum == 0.0f ? 0.0f : acc / sum);
    if (dim == 0)
      p.lse[lse_offset(p, item.s, item.batch, item.head) + item.query] =
          sum == 0.0f ? -INFINITY : (max + __log2f(sum)) * kLn2;
  }
};

// What the keys [begin, end) give, shared by the threads of a group.
template <typename T, int kDim>
__device__ __forceinline__ Partial attend(const AttentionProblem& p, const Item& item, int begin, int end) {
  constexpr int kLanes = lanes_of_row(kDim), kGroups = kThreads / kLanes;
  const int group = threadIdx.x / kLanes, dim = 8 * (threadIdx.x % kLanes);
  const bool has_dim = dim < p.head_dim;
  const T* k = static_cast<const T*>(p.k.data) + key_offset(p.k, item.s, item.batch, item.head) + dim;
  const T* v = static_cast<const T*>(p.v.data) + key_offset(p.v, item.s, item.batch, item.head) + dim;

  auto load = [&](uint4(&rows)[kUnroll], const T* from, int64_t stride, int key0) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t key = key0 + u * kGroups;
      rows[u] = {};
      if (key < end && has_dim) rows[u] = ptx::load_once_16(from + key * stride);
    }
  };
  Partial result;
  uint4 rows_k[kUnroll], rows_v[kUnroll];
  load(rows_k, k, p.k.seq, begin + group);
  load(rows_v, v, p.v.seq, begin + group);
  uint4 row_q = {};
  if (has_dim) row_q = *reinterpret_cast<const uint4*>(item.row<const T>(p.q) + dim);
  float q[8], x[8];
  unpack<T>(q, row_q);
  for (int key0 = begin + group; key0 - group < end; key0 += kUnroll * kGroups) {
    uint4 now_k[kUnroll], now_v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) now_k[u] = rows_k[u], now_v[u] = rows_v[u];
    load(rows_k, k, p.k.seq, key0 + kUnroll * kGroups);  // under way while these are at work
    load(rows_v, v, p.v.seq, key0 + kUnroll * kGroups);
    float scores[kUnroll], top = result.max;
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
  return result;
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads)
    attention_fwd_decode(const __grid_constant__ AttentionProblem p, const __grid_constant__ Split split) {
  constexpr int kLanes = lanes_of_row(kDim), kRow = kDim + 2;
  ptx::let_next_kernel_begin();
  if (split.cluster > 1) ptx::cluster_arrive_relaxed();
  const unsigned ctas = split.ctas(), number = blockIdx.x / ctas;  // unsigned numbers are divided faster
  const int part = blockIdx.x % ctas, rank = blockIdx.x % static_cast<unsigned>(split.cluster);
  const Item item(p, number);
  const Visible visible(p, item.s);
  const int last = max(visible.lo, min(visible.hi, item.query + visible.diagonal + 1));
  const int share = (last - visible.lo + ctas - 1) / ctas, begin = visible.lo + part * share;
  const Partial of_warp = attend<T, kDim>(p, item, begin, min(begin + share, last));

  const uint32_t base = ptx::dynamic_shared();
  float* rows = static_cast<float*>(__cvta_shared_to_generic(base));
  const int lane = threadIdx.x % 32, dim = threadIdx.x;
  if (lane < kLanes && 8 * lane < kDim) {  // at 96 a group has lanes to spare
    float* row = rows + threadIdx.x / 32 * kRow;
#pragma unroll
    for (int i = 0; i < 8; ++i) row[8 * lane + i] = of_warp.acc[i];
    if (lane == 0) row[kDim] = of_warp.sum, row[kDim + 1] = of_warp.max;
  }
  __syncthreads();
  Element element;
  if (dim < kDim)
    element = Element::add_up<kDim, kWarps>(kWarps, dim, [&](int warp, int j) { return rows[warp * kRow + j]; });
  if (split.cluster > 1) {
    ptx::cluster_wait();  // the first one has begun
    const uint32_t row = base + 4 * (kWarps + rank) * kRow;
    if (dim < kDim) element.store_row<kDim>(dim, [&](int j, float x) { ptx::store_to_cluster(row + 4 * j, 0, x); });
    ptx::cluster_arrive();
    if (rank != 0) return;
    ptx::cluster_wait();
    if (dim < kDim)
      element = Element::add_up<kDim, kMaxCluster>(split.cluster, dim,
                                                   [&](int cta, int j) { return rows[(kWarps + cta) * kRow + j]; });
  }
  if (dim >= kDim) return;
  if (split.clusters > 1) {
    float* row = p.partial + int64_t{blockIdx.x / split.cluster} * kRow;
    element.store_row<kDim>(dim, [&](int j, float x) { row[j] = x; });
  } else {
    element.store_result<T>(p, item, dim);
  }
}

// One CTA an item, a thread a dimension.
template <typename T, int kDim>
__global__ void __launch_bounds__(kDim)
    attention_fwd_decode_combine(const __grid_constant__ AttentionProblem p, int clusters) {
  const Item item(p, blockIdx.x);
  const float* partial = p.partial + int64_t{blockIdx.x} * clusters * (kDim + 2);
  ptx::await_previous_kernel();
  const int dim = threadIdx.x;
  Element::add_up<kDim, 8>(clusters, dim, [&](int i, int j) {
    return partial[i * (kDim + 2) + j];
  }).template store_result<T>(p, item, dim);
}

int64_t items_of(const AttentionProblem& p) { return p.batch * p.heads * p.seqlen_q; }

constexpr int shared_bytes(int dim) { return 4 * (kWarps + kMaxCluster) * (dim + 2); }

// The split with the least work for a CTA one after the other, of those with enough keys for each to be worth starting.
// Further clusters, or CTAs where there are none, only where one leaves half of the GPU idle.
Split split_of(const AttentionProblem& p) {
  const int64_t items = items_of(p), most = std::max<int64_t>(1, p.seqlen_k / kMinKeys);
  Split best{1, 1};
  int at_once = multiprocessors();
  double least = static_cast<double>(ceil_div(items, at_once));
  for (int cluster = 2; cluster <= std::min<int64_t>(most, kMaxCluster); ++cluster) {
    // Of one instance for all: each fills a multiprocessor.
    const int clusters =
        clusters_at_once<attention_fwd_decode<__nv_bfloat16, 128>, shared_bytes(128)>(cluster, kThreads);
    if (clusters == 0 || ceil_div(items, clusters) >= least * cluster) continue;
    best.cluster = cluster, at_once = clusters, least = static_cast<double>(ceil_div(items, clusters)) / cluster;
  }
  if (items > 0) best.clusters = static_cast<int>(std::max<int64_t>(1, std::min(most / best.cluster, at_once / items)));
  return best;
}

}  // namespace

bool takes_decode(const AttentionProblem& p) {
  return p.seqlen_q <= kMaxQueries && p.cu_seqlens_q == nullptr && p.rows.start == nullptr && p.rng_state == nullptr;
}

int64_t decode_scratch(const AttentionProblem& p) {
  const Split split = split_of(p);
  return split.clusters == 1 ? 0 : items_of(p) * split.clusters * (padded_dim(p.head_dim) + 2);
}

void attention_fwd_decode(const AttentionProblem& p) {
  const Split split = split_of(p);
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    if constexpr (!kDropout) {
      launch_clusters<attention_fwd_decode<T, kDim>, shared_bytes(kDim)>(
          "attention_fwd_decode", items_of(p) * split.ctas(), split.cluster, kThreads, p.stream, p, split);
      if (split.clusters > 1)
        launch<attention_fwd_decode_combine<T, kDim>, 0, true>("attention_fwd_decode_combine", items_of(p), kDim,
                                                               p.stream, p, split.clusters);
    }
  });
}

}  // namespace flash_models
