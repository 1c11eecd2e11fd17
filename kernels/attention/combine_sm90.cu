// SPDX-License-Identifier: Apache-2.0
//
// Second launch of a pass with a layout whose long lines were cut into pieces (flash_models/_schedule.py): combines
// what the pieces left, in their order, so that a result does not depend on which CTA came first. Outputs are weighted
// by exp(lse - combined lse), gradients summed. A CTA has 64 rows of the first piece of a line; the CTAs of all other
// items leave at once.
#include "dispatch.cuh"
#include "hopper/tile.cuh"
#include "partial.cuh"
#include "softmax.cuh"

namespace flash_models {
namespace {

constexpr int kRows = 64, kThreads = 128;

// The pieces of the line that item `number` begins; 0 where it begins none.
__device__ __forceinline__ int pieces_of_line(const WorkItems& work, int number) {
  const int4* items = reinterpret_cast<const int4*>(work.items);
  const int line = items[number].x, lane = threadIdx.x % 32;
  if (line < 0 || items[number].w < 0 || (number > 0 && items[number - 1].x == line)) return 0;
  for (int pieces = 0;; pieces += 32) {
    const int other = number + pieces + lane;
    const unsigned same = __ballot_sync(~0u, other < work.count && items[other].x == line);
    if (same != ~0u) return pieces + __popc(same);
  }
}

// What a warp combines: 16 rows of a line.
struct Combination {
  const ListedWork work;
  const int number, row0, pieces;
  const Lane lane;

  __device__ __forceinline__ Combination(const AttentionProblem& p, const BlockLists& lists, const WorkItems& items,
                                         int64_t lines)
      : work(p, lists, items, lines, blockIdx.x / (static_cast<int>(p.block_size) / kRows)),
        number(blockIdx.x / (static_cast<int>(p.block_size) / kRows)),
        row0(blockIdx.x % (static_cast<int>(p.block_size) / kRows) * kRows + threadIdx.x / 32 * 16),
        pieces(work.slot < 0 ? 0 : pieces_of_line(items, number / ListedWork::copies(p, lists))) {}

  __device__ __forceinline__ int token0(const AttentionProblem& p) const {
    return work.place.tile * static_cast<int>(p.block_size) + row0;
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads)
    attention_fwd_combine_sm90(const __grid_constant__ AttentionProblem p, int64_t lines) {
  constexpr int kOfWarp = partial_out_floats(kDim);
  const Combination c(p, p.rows, p.row_items, lines);
  ptx::await_previous_kernel();
  if (c.pieces == 0) return;
  const Place& place = c.work.place;
  const Sequence s = sequence_of(p, place.batch);
  const int q0 = c.token0(p), rows = static_cast<int>(s.q_len) - q0;
  if (rows <= 0) return;
  auto piece = [&](int i) { return partial_of_warp(p, c.work.slot + i, c.row0, kOfWarp); };
  auto lse_of = [&](int i, int half) { return piece(i)[16 * kDim + c.lane.row + 8 * half]; };

  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, out[1][kDim / 8][4], factor[1][2];
  clear(out);
  for (int i = 0; i < c.pieces; ++i)
    for (int half = 0; half < 2; ++half) top[half] = fmaxf(top[half], lse_of(i, half));
#pragma unroll 2
  for (int i = 0; i < c.pieces; ++i) {
    for (int half = 0; half < 2; ++half) {  // no key in any piece: 0
      factor[0][half] = top[half] == -INFINITY ? 0.0f : ptx::exp2_approx((lse_of(i, half) - top[half]) * kLog2e);
      sum[half] += factor[0][half];
    }
    add_partial(out, factor[0], piece(i), c.lane.id);
  }
  float* lse = p.lse + lse_offset(p, s, place.batch, place.head) + q0;
  for (int half = 0; half < 2; ++half) {
    factor[0][half] = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
    if (c.lane.id % 4 == 0 && c.lane.row + 8 * half < rows)
      lse[c.lane.row + 8 * half] = sum[half] == 0.0f ? -INFINITY : top[half] + __log2f(sum[half]) * kLn2;
  }
  T* target = static_cast<T*>(p.out.data) + query_offset(p.out, s, place.batch, place.head) + q0 * p.out.seq;
  store_fragments<T>(out, factor, target, p.out.seq, rows, static_cast<int>(p.head_dim), c.lane);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_combine_sm90(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionGradients g,
                               int64_t lines) {
  constexpr int kOfWarp = partial_dkv_floats(kDim);
  const Combination c(p, p.columns, p.column_items, lines);
  ptx::let_next_kernel_begin();
  ptx::await_previous_kernel();
  if (c.pieces == 0) return;
  const Place& place = c.work.place;
  const Sequence s = sequence_of(p, place.batch);
  const int k0 = c.token0(p), rows = static_cast<int>(s.k_len) - k0;
  if (rows <= 0) return;
  auto combine = [&](const View& view, int offset, float scale) {
    const float one[2] = {1.0f, 1.0f}, factor[1][2] = {{scale, scale}};
    float sum[1][kDim / 8][4];
    clear(sum);
#pragma unroll 2
    for (int i = 0; i < c.pieces; ++i)
      add_partial(sum, one, partial_of_warp(p, c.work.slot + i, c.row0, kOfWarp) + offset, c.lane.id);
    T* target = static_cast<T*>(view.data) + key_offset(view, s, place.batch, place.head) + k0 * view.seq;
    store_fragments<T>(sum, factor, target, view.seq, rows, static_cast<int>(p.head_dim), c.lane);
  };
  combine(g.dk, 0, p.scale);
  combine(g.dv, 16 * kDim, p.rng_state != nullptr ? p.keep_scale : 1.0f);
}

int64_t ctas(const AttentionProblem& p, const BlockLists& lists, const WorkItems& work) {
  return ListedWork::count(p, lists, work.count) * (p.block_size / kRows);
}

}  // namespace

void attention_fwd_combine_sm90(const AttentionProblem& p) {
  if (p.row_items.max_slots == 0) return;
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    launch<attention_fwd_combine_sm90<T, kDim>, 0, true>("attention_fwd_combine_sm90", ctas(p, p.rows, p.row_items),
                                                         kThreads, p.stream, p, ceil_div(p.seqlen_q, p.block_size));
  });
}

void attention_bwd_combine_sm90(const AttentionProblem& p, const AttentionGradients& g) {
  if (p.column_items.max_slots == 0) return;
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    launch<attention_bwd_combine_sm90<T, kDim>, 0, true>("attention_bwd_combine_sm90",
                                                         ctas(p, p.columns, p.column_items), kThreads, p.stream, p, g,
                                                         ceil_div(p.seqlen_k, p.block_size));
  });
}

}  // namespace flash_models
