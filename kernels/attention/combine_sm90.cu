// SPDX-License-Identifier: Apache-2.0
//
// Second launch of a pass with a layout whose long lines were cut into pieces (flash_models/_schedule.py): combines
// what the pieces left, in their order, so that a result does not depend on which CTA came first. Outputs are weighted
// by exp(lse - combined lse), gradients summed.
//
// Few lines are long, and all wait for them, so the work is spread thin: a CTA looks through 32 items for those that
// begin such a line, and of these lines it has 16 rows, a warp eight columns of them, the reads of several pieces under
// way. What it looks for does not depend on the kernel before, whose end hides that.
#include "dispatch.cuh"
#include "hopper/tile.cuh"
#include "partial.cuh"
#include "softmax.cuh"

namespace flash_models {
namespace {

constexpr int kRows = 16, kItems = 32;

// The pieces of the line that item `number` begins.
__device__ __forceinline__ int pieces_of_line(const WorkItems& work, int number) {
  const int4* items = reinterpret_cast<const int4*>(work.items);
  const int line = items[number].x, lane = threadIdx.x % 32;
  for (int pieces = 0;; pieces += 32) {
    const int other = number + pieces + lane;
    const unsigned same = __ballot_sync(~0u, other < work.count && items[other].x == line);
    if (same != ~0u) return pieces + __popc(same);
  }
}

// The share of a CTA, and of a thread: rows `row` and `row` + 8 of the CTA's, columns `dim` and `dim` + 1.
struct Share {
  const int copy, group, row0, row, dim;

  __device__ __forceinline__ Share(const AttentionProblem& p, const BlockLists& lists)
      : copy(blockIdx.x / units(p) % ListedWork::copies(p, lists)),
        group(blockIdx.x / units(p) / ListedWork::copies(p, lists)),
        row0(kRows * (blockIdx.x % units(p))),
        row(threadIdx.x % 32 / 4),
        dim(threadIdx.x / 32 * 8 + threadIdx.x % 4 * 2) {}

  static __host__ __device__ __forceinline__ int units(const AttentionProblem& p) {
    return static_cast<int>(p.block_size) / kRows;
  }
  static int64_t ctas(const AttentionProblem& p, const BlockLists& lists, const WorkItems& work) {
    return ceil_div(work.count, kItems) * ListedWork::copies(p, lists) * units(p);
  }

  // Calls `visit(place, first slot, pieces)` for every line that one of the group's items begins and others go on, when
  // the kernel before has ended.
  template <typename Visit>
  __device__ __forceinline__ void for_each_line(const AttentionProblem& p, const BlockLists& lists,
                                                const WorkItems& work, int64_t lines, Visit visit) const {
    const int4* items = reinterpret_cast<const int4*>(work.items);
    const int mine = kItems * group + threadIdx.x % 32;
    const bool begins = mine < work.count && items[mine].w >= 0 && (mine == 0 || items[mine - 1].x != items[mine].x);
    for (unsigned left = __ballot_sync(~0u, begins); left != 0; left &= left - 1) {
      const int number = kItems * group + __ffs(static_cast<int>(left)) - 1;
      const ListedWork first(p, lists, work, lines, number * ListedWork::copies(p, lists) + copy);
      const int pieces = pieces_of_line(work, number);
      ptx::await_previous_kernel();
      visit(first.place, first.slot, pieces);
    }
    ptx::await_previous_kernel();
  }

  // What store_partial left of the thread's elements.
  __device__ __forceinline__ float4 of_partial(const float* partial) const {
    return reinterpret_cast<const float4*>(partial)[threadIdx.x];
  }

  template <typename T>
  __device__ __forceinline__ void store(const AttentionProblem& p, const float4& x, T* rows, int64_t row_stride,
                                        int rows_valid) const {
    if (dim >= p.head_dim) return;
    T* target = rows + row * row_stride + dim;
    if (row < rows_valid) *reinterpret_cast<uint32_t*>(target) = pack<T>(x.x, x.y);
    if (row + 8 < rows_valid) *reinterpret_cast<uint32_t*>(target + 8 * row_stride) = pack<T>(x.z, x.w);
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(4 * kDim)
    attention_fwd_combine_sm90(const __grid_constant__ AttentionProblem p, int64_t lines) {
  const Share share(p, p.rows);
  share.for_each_line(p, p.rows, p.row_items, lines, [&](const Place& place, int64_t slot, int pieces) {
    const Sequence s = sequence_of(p, place.batch);
    const int q0 = place.tile * static_cast<int>(p.block_size) + share.row0, rows = static_cast<int>(s.q_len) - q0;
    if (rows <= 0) return;
    auto piece = [&](int i) { return partial_of_warp(p, slot + i, share.row0, partial_out_floats(kDim)); };
    auto lse_of = [&](int i, int half) { return piece(i)[16 * kDim + share.row + 8 * half]; };

    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll 8
    for (int i = 0; i < pieces; ++i)
      for (int half = 0; half < 2; ++half) top[half] = fmaxf(top[half], lse_of(i, half));
    float4 out{};
#pragma unroll 8
    for (int i = 0; i < pieces; ++i) {
      const float4 x = share.of_partial(piece(i));
      float weight[2];
      for (int half = 0; half < 2; ++half) {  // no key in any piece: 0
        weight[half] = top[half] == -INFINITY ? 0.0f : ptx::exp2_approx((lse_of(i, half) - top[half]) * kLog2e);
        sum[half] += weight[half];
      }
      out.x = fmaf(weight[0], x.x, out.x), out.y = fmaf(weight[0], x.y, out.y);
      out.z = fmaf(weight[1], x.z, out.z), out.w = fmaf(weight[1], x.w, out.w);
    }
    float* lse = p.lse + lse_offset(p, s, place.batch, place.head) + q0;
    float factor[2];
    for (int half = 0; half < 2; ++half) {
      factor[half] = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
      if (share.dim == 0 && share.row + 8 * half < rows)
        lse[share.row + 8 * half] = sum[half] == 0.0f ? -INFINITY : top[half] + __log2f(sum[half]) * kLn2;
    }
    out = {out.x * factor[0], out.y * factor[0], out.z * factor[1], out.w * factor[1]};
    T* target = static_cast<T*>(p.out.data) + query_offset(p.out, s, place.batch, place.head) + q0 * p.out.seq;
    share.store<T>(p, out, target, p.out.seq, rows);
  });
}

template <typename T, int kDim>
__global__ void __launch_bounds__(4 * kDim)
    attention_bwd_combine_sm90(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionGradients g,
                               int64_t lines) {
  const Share share(p, p.columns);
  ptx::let_next_kernel_begin();
  share.for_each_line(p, p.columns, p.column_items, lines, [&](const Place& place, int64_t slot, int pieces) {
    const Sequence s = sequence_of(p, place.batch);
    const int k0 = place.tile * static_cast<int>(p.block_size) + share.row0, rows = static_cast<int>(s.k_len) - k0;
    if (rows <= 0) return;
    float4 dk{}, dv{};
    auto add = [](float4& sum, const float4& x) { sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w; };
#pragma unroll 8
    for (int i = 0; i < pieces; ++i) {
      const float* piece = partial_of_warp(p, slot + i, share.row0, partial_dkv_floats(kDim));
      add(dk, share.of_partial(piece));
      add(dv, share.of_partial(piece + 16 * kDim));
    }
    auto store = [&](const View& view, const float4& x, float scale) {
      T* target = static_cast<T*>(view.data) + key_offset(view, s, place.batch, place.head) + k0 * view.seq;
      share.store<T>(p, {scale * x.x, scale * x.y, scale * x.z, scale * x.w}, target, view.seq, rows);
    };
    store(g.dk, dk, p.scale);
    store(g.dv, dv, p.rng_state != nullptr ? p.keep_scale : 1.0f);
  });
}

}  // namespace

void attention_fwd_combine_sm90(const AttentionProblem& p) {
  if (p.row_items.max_slots == 0) return;
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    launch<attention_fwd_combine_sm90<T, kDim>, 0, true>("attention_fwd_combine_sm90",
                                                         Share::ctas(p, p.rows, p.row_items), 4 * kDim, p.stream, p,
                                                         ceil_div(p.seqlen_q, p.block_size));
  });
}

void attention_bwd_combine_sm90(const AttentionProblem& p, const AttentionGradients& g) {
  if (p.column_items.max_slots == 0) return;
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    launch<attention_bwd_combine_sm90<T, kDim>, 0, true>("attention_bwd_combine_sm90",
                                                         Share::ctas(p, p.columns, p.column_items), 4 * kDim, p.stream,
                                                         p, g, ceil_div(p.seqlen_k, p.block_size));
  });
}

}  // namespace flash_models
