// SPDX-License-Identifier: Apache-2.0
//
// Deterministic dQ for sm_80 and later: one CTA owns a tile of 64 queries and adds over key tiles in a fixed order, at
// the price of computing the scores a second time (7 products a tile pair instead of 5).
//
//   warps           4 x 1: 16 queries each; P and dS stay in registers, dS is its own A operand of dQ += dS K
//   shared memory   Q | dO [64 x kDim] | K [2] | V [2] [kTileK x kDim]
#include "dispatch.cuh"
#include "dropout.cuh"
#include "row_tiles.cuh"
#include "softmax.cuh"

namespace flash_models {
namespace {

constexpr int kTileQ = 64, kThreads = 128;

template <typename T, int kDim>
struct GradientTiles {
  static constexpr int kTileK = kDim <= 64 ? 64 : 32;
  using Query = Tile<T, kTileQ, kDim>;
  using Key = Tile<T, kTileK, kDim>;
  static constexpr int kBytes = 2 * Query::kBytes + 4 * Key::kBytes;
  uint32_t shared;

  __device__ __forceinline__ Query q() const { return {shared}; }
  __device__ __forceinline__ Query dout() const { return {shared + Query::kBytes}; }
  __device__ __forceinline__ Key k(int stage) const { return {shared + 2 * Query::kBytes + stage * Key::kBytes}; }
  __device__ __forceinline__ Key v(int stage) const { return {shared + 2 * Query::kBytes + (2 + stage) * Key::kBytes}; }
};

template <typename T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kThreads, 2)
    attention_bwd_dq_sm80(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionGradients g,
                          int query_tiles) {
  constexpr int kTileK = GradientTiles<T, kDim>::kTileK;
  const GradientTiles<T, kDim> tiles{ptx::dynamic_shared()};
  const Lane lane;
  const int row0 = 16 * (threadIdx.x / 32);

  const Place place(p, blockIdx.x, query_tiles, p.causal);
  const int head = place.head, batch = place.batch;
  const Sequence s = sequence_of(p, batch);
  const int q0 = place.tile * kTileQ, q_len = static_cast<int>(s.q_len), dim = static_cast<int>(p.head_dim);
  if (q0 >= q_len) return;

  const Visible visible(p, s);
  const Tiles walk = key_tiles(p, visible, Piece::of_line(p.rows, p.block_size, head, q0), q0, kTileQ, kTileK);
  const T* k = static_cast<const T*>(p.k.data) + key_offset(p.k, s, batch, head);
  const T* v = static_cast<const T*>(p.v.data) + key_offset(p.v, s, batch, head);
  auto load_keys = [&](int position, int stage) {
    const int k0 = walk.tile(position) * kTileK;
    tiles.k(stage).template load_async<kThreads>(k + k0 * p.k.seq, p.k.seq, visible.lo - k0, visible.hi - k0, dim);
    tiles.v(stage).template load_async<kThreads>(v + k0 * p.v.seq, p.v.seq, visible.lo - k0, visible.hi - k0, dim);
  };
  const T* q = static_cast<const T*>(p.q.data) + query_offset(p.q, s, batch, head) + q0 * p.q.seq;
  const T* dout = static_cast<const T*>(g.dout.data) + query_offset(g.dout, s, batch, head) + q0 * g.dout.seq;
  tiles.q().template load_async<kThreads>(q, p.q.seq, 0, q_len - q0, dim);
  tiles.dout().template load_async<kThreads>(dout, g.dout.seq, 0, q_len - q0, dim);
  int position = walk.next(0), stage = 0;
  if (position < walk.count) load_keys(position, stage);
  ptx::cp_async_commit();

  float shift[2], delta[2];  // of this lane's two rows; shift = +inf makes every probability 0
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = q0 + row0 + 8 * half + lane.row;
    shift[half] = g.shift[padded_row(p, s, batch, head) + row];
    delta[half] = g.delta[padded_row(p, s, batch, head) + row];
  }

  const Dropout dropout(p, batch * p.heads + head);
  float dq[1][kDim / 8][4];
  clear(dq);
  while (position < walk.count) {
    const int next = walk.next(position + 1);
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (next < walk.count) load_keys(next, stage ^ 1);
    ptx::cp_async_commit();

    const int k0 = walk.tile(position) * kTileK;
    float prob[1][kTileK / 8][4], ds[1][kTileK / 8][4];
    clear(prob);
    clear(ds);
    multiply<T, kDim, false, true>(prob, tiles.q(), row0, tiles.k(stage), 0, lane.id);
    multiply<T, kDim, false, true>(ds, tiles.dout(), row0, tiles.v(stage), 0, lane.id);
    if (!visible.all(q0 + row0, k0, kTileK)) mask_scores(prob, visible, q0 + row0, k0, lane);
    if constexpr (kDropout) {
      KeepBits<1, kTileK / 8> keep;
      keep.draw(dropout, q0 + row0, k0, lane);
      keep.drop(ds);
    }
#pragma unroll
    for (int n = 0; n < kTileK / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float dprob = kDropout ? ds[0][n][i] * p.keep_scale : ds[0][n][i];
        ds[0][n][i] = ptx::exp2_approx(fmaf(prob[0][n][i], p.scale_log2, -shift[i / 2])) * (dprob - delta[i / 2]);
      }
    }
    multiply_registers<T>(dq, ds, tiles.k(stage), lane.id);
    position = next;
    stage ^= 1;
  }

  ptx::cp_async_wait<0>();
  __syncthreads();
  store_accumulator<T>(dq, {{p.scale, p.scale}}, tiles.q(), row0, 0, lane);
  __syncwarp();
  T* out = static_cast<T*>(g.dq.data) + query_offset(g.dq, s, batch, head) + q0 * g.dq.seq;
  tiles.q().template store_rows<16>(row0, out, g.dq.seq, q_len - q0, dim);
}

}  // namespace

void attention_bwd_dq_sm80(const AttentionProblem& p, const AttentionGradients& g) {
  const int query_tiles = static_cast<int>(ceil_div(p.seqlen_q, kTileQ));
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    launch<attention_bwd_dq_sm80<T, kDim, kDropout>, GradientTiles<T, kDim>::kBytes>(
        "attention_bwd_dq_sm80", query_tiles * p.heads * p.batch, kThreads, p.stream, p, g, query_tiles);
  });
}

}  // namespace flash_models
