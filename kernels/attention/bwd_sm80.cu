// SPDX-License-Identifier: Apache-2.0
//
// Backward pass for sm_80 and later (arXiv 2205.14135, Algorithm 4), after bwd_rows.cu two launches:
//   1. one CTA a tile of 64 keys walks the query tiles that see it. Scores are computed transposed, S^T = K Q^T, so
//   that a
//      warp's accumulators hold whole keys:
//        P^T  = exp(scale S^T - lse)             dV += P^T dO
//        dS^T = P^T * (V dO^T - delta)           dK += scale dS^T Q           dQ += scale dS K   (added in fp32 by L2)
//   2. the fp32 sum of dQ is scaled and rounded. In deterministic mode 1. leaves dQ alone and bwd_dq_sm80.cu computes
//   it.
//
//   warps           2 x 2: S^T and dP^T 32 keys x 32 queries, dV and dK 32 keys x kDim / 2, dQ 32 queries x kDim / 2
//   shared memory   K | V [64 x kDim] | Q | dO [kStages][64 x kDim] | P^T | dS^T [64 x 64] | shift | delta
//   [kStages][64]
#include "dispatch.cuh"
#include "dropout.cuh"
#include "row_tiles.cuh"
#include "softmax.cuh"

namespace flash_models {
namespace {

constexpr int kTile = 64, kThreads = 128;

template <typename T, int kDim_>
struct BackwardTiles {
  static constexpr int kDim = kDim_;
  // Two stages of Q and dO where three CTAs fit beside each other; one keeps kDim 128 within the 99 KB of sm_86 and
  // sm_89.
  static constexpr int kStages = kDim <= 64 ? 2 : 1;
  static constexpr int kCtasPerSm = kDim <= 64 ? 3 : 2;
  using Rows = Tile<T, kTile, kDim>;
  using Scores = Tile<T, kTile, kTile>;
  static constexpr int kBytes = (2 + 2 * kStages) * Rows::kBytes + 2 * Scores::kBytes + 2 * kStages * kTile * 4;
  uint32_t shared;

  __device__ __forceinline__ Rows k() const { return {shared}; }
  __device__ __forceinline__ Rows v() const { return {shared + Rows::kBytes}; }
  __device__ __forceinline__ Rows q(int stage) const { return {shared + (2 + stage) * Rows::kBytes}; }
  __device__ __forceinline__ Rows dout(int stage) const { return {shared + (2 + kStages + stage) * Rows::kBytes}; }
  __device__ __forceinline__ Scores p() const { return {shared + (2 + 2 * kStages) * Rows::kBytes}; }
  __device__ __forceinline__ Scores ds() const { return {p().base + Scores::kBytes}; }
  __device__ __forceinline__ uint32_t shift(int stage) const { return ds().base + Scores::kBytes + stage * kTile * 4; }
  __device__ __forceinline__ uint32_t delta(int stage) const { return shift(kStages + stage); }
};

// P^T and dS^T of this warp's 32 keys x 32 queries: scores -> P (undropped, for dS) -> stored P (dropped) and dS.
template <typename T, bool kDropout, typename Scores>
__device__ __forceinline__ void probabilities_and_gradients(float (&s)[2][4][4], float (&dp)[2][4][4],
                                                            const AttentionProblem& p, uint32_t shift, uint32_t delta,
                                                            int key0, int query0, int q0, int k0,
                                                            const Dropout& dropout, const Scores& tile_p,
                                                            const Scores& tile_ds, const Lane& lane) {
  KeepTransposed<4> keep;
  if constexpr (kDropout) keep.draw(dropout, q0 + query0, k0 + key0, lane);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int query = query0 + 8 * n + lane.col;
    const float2 row_shift = *static_cast<const float2*>(__cvta_shared_to_generic(shift + 4 * query));
    const float2 row_delta = *static_cast<const float2*>(__cvta_shared_to_generic(delta + 4 * query));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float prob = ptx::exp2_approx(fmaf(s[m][n][i], p.scale_log2, -(i % 2 ? row_shift.y : row_shift.x)));
        float dprob = dp[m][n][i];
        float dropped = prob;
        if constexpr (kDropout) {
          const bool kept = keep.kept(2 * m + i / 2, n, i % 2);
          dprob = kept ? dprob * p.keep_scale : 0.0f;
          dropped = kept ? prob : 0.0f;
        }
        s[m][n][i] = dropped;
        dp[m][n][i] = prob * (dprob - (i % 2 ? row_delta.y : row_delta.x));
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = key0 + 16 * m + 8 * half + lane.row;
        tile_p.store_pair(key, query, pack<T>(s[m][n][2 * half], s[m][n][2 * half + 1]));
        tile_ds.store_pair(key, query, pack<T>(dp[m][n][2 * half], dp[m][n][2 * half + 1]));
      }
    }
  }
}

// One warp's share of a tile of dq_sum: fragments [2][kDim / 16] of 128 floats.
template <int kDim>
__device__ __forceinline__ float* dq_fragments(float* tile, int warp) {
  return tile + warp * (kTile * kDim / 4);
}

template <typename T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kThreads, BackwardTiles<T, kDim>::kCtasPerSm)
    attention_bwd_dkv_sm80(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionGradients g,
                           int key_tiles) {
  using Tiles_ = BackwardTiles<T, kDim>;
  constexpr int kStages = Tiles_::kStages;
  const Tiles_ tiles{ptx::dynamic_shared()};
  const Lane lane;
  const int warp = threadIdx.x / 32;
  const int key0 = 32 * (warp / 2), query0 = 32 * (warp % 2), dim0 = kDim / 2 * (warp % 2);

  // The first keys have most work: under a causal mask, and as the global tokens of many layouts.
  const Place place(p, blockIdx.x, key_tiles, false);
  const int head = place.head, batch = place.batch;
  const Sequence s = sequence_of(p, batch);
  const int k0 = place.tile * kTile, q_len = static_cast<int>(s.q_len), k_len = static_cast<int>(s.k_len);
  const int dim = static_cast<int>(p.head_dim);
  if (k0 >= k_len) return;

  const Visible visible(p, s);
  const Tiles walk = query_tiles(p, s, visible, Piece::of_line(p.columns, p.block_size, head, k0), k0, kTile, kTile);
  const T* q = static_cast<const T*>(p.q.data) + query_offset(p.q, s, batch, head);
  const T* dout = static_cast<const T*>(g.dout.data) + query_offset(g.dout, s, batch, head);
  const int64_t row_offset = padded_row(p, s, batch, head);
  auto load_queries = [&](int position, int stage) {
    const int q0 = walk.tile(position) * kTile;
    tiles.q(stage).template load_async<kThreads>(q + q0 * p.q.seq, p.q.seq, 0, q_len - q0, dim);
    tiles.dout(stage).template load_async<kThreads>(dout + q0 * g.dout.seq, g.dout.seq, 0, q_len - q0, dim);
    const int row = threadIdx.x % kTile;
    const float* source = (threadIdx.x < kTile ? g.shift : g.delta) + row_offset + q0 + row;
    const uint32_t target = (threadIdx.x < kTile ? tiles.shift(stage) : tiles.delta(stage)) + 4 * row;
    ptx::cp_async_4(target, source);  // past the end shift = +inf, which makes probabilities zero
  };

  const T* k = static_cast<const T*>(p.k.data) + key_offset(p.k, s, batch, head) + k0 * p.k.seq;
  const T* v = static_cast<const T*>(p.v.data) + key_offset(p.v, s, batch, head) + k0 * p.v.seq;
  tiles.k().template load_async<kThreads>(k, p.k.seq, visible.lo - k0, visible.hi - k0, dim);
  tiles.v().template load_async<kThreads>(v, p.v.seq, visible.lo - k0, visible.hi - k0, dim);
  int position = walk.next(0), stage = 0;
  if (position < walk.count) load_queries(position, stage);
  ptx::cp_async_commit();

  const Dropout dropout(p, batch * p.heads + head);
  float dk[2][kDim / 16][4], dv[2][kDim / 16][4];
  clear(dk);
  clear(dv);

  while (position < walk.count) {
    const int next = walk.next(position + 1);
    const int q0 = walk.tile(position) * kTile;
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (kStages == 2) {
      if (next < walk.count) load_queries(next, stage ^ 1);
      ptx::cp_async_commit();
    }

    {
      float scores[2][4][4], dp[2][4][4];
      clear(scores);
      clear(dp);
      multiply<T, kDim, false, true>(scores, tiles.k(), key0, tiles.q(stage), query0, lane.id);
      multiply<T, kDim, false, true>(dp, tiles.v(), key0, tiles.dout(stage), query0, lane.id);
      if (!visible.all(q0, k0, kTile)) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (!visible(q0 + query0 + 8 * n + lane.col + i % 2, k0 + key0 + 16 * m + 8 * (i / 2) + lane.row))
                scores[m][n][i] = -INFINITY;
      }
      probabilities_and_gradients<T, kDropout>(scores, dp, p, tiles.shift(stage), tiles.delta(stage), key0, query0, q0,
                                               k0, dropout, tiles.p(), tiles.ds(), lane);
    }
    __syncthreads();  // P^T and dS^T are complete

    multiply<T, kTile, false, false>(dv, tiles.p(), key0, tiles.dout(stage), dim0, lane.id);
    multiply<T, kTile, false, false>(dk, tiles.ds(), key0, tiles.q(stage), dim0, lane.id);
    if (kStages == 1) {
      __syncthreads();  // every warp has read Q and dO
      if (next < walk.count) load_queries(next, 0);
      ptx::cp_async_commit();
    }

    if (g.dq_sum != nullptr) {
      float dq[2][kDim / 16][4];
      clear(dq);
      multiply<T, kTile, true, false>(dq, tiles.ds(), 32 * (warp / 2), tiles.k(), dim0, lane.id);
      float* sum = dq_fragments<kDim>(dq_tile(p, g.dq_sum, s, batch, head, q0, kDim), warp);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) ptx::red_add_fragment(sum + 128 * (m * (kDim / 16) + n), lane.id, dq[m][n]);
    }
    position = next;
    if (kStages == 2) stage ^= 1;
  }

  ptx::cp_async_wait<0>();
  __syncthreads();
  const float dv_scale = kDropout ? p.keep_scale : 1.0f;
  store_accumulator<T>(dk, {{p.scale, p.scale}, {p.scale, p.scale}}, tiles.k(), key0, dim0, lane);
  store_accumulator<T>(dv, {{dv_scale, dv_scale}, {dv_scale, dv_scale}}, tiles.v(), key0, dim0, lane);
  __syncthreads();
  T* dk_out = static_cast<T*>(g.dk.data) + key_offset(g.dk, s, batch, head) + k0 * g.dk.seq;
  T* dv_out = static_cast<T*>(g.dv.data) + key_offset(g.dv, s, batch, head) + k0 * g.dv.seq;
  tiles.k().template store_rows<16>(16 * warp, dk_out, g.dk.seq, k_len - k0, dim);
  tiles.v().template store_rows<16>(16 * warp, dv_out, g.dv.seq, k_len - k0, dim);
}

// dq = scale * dq_sum, one CTA a query tile with the warp layout that added it up.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_store_dq(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionGradients g,
                           int query_tile_count) {
  const Tile<T, kTile, kDim> tile{ptx::dynamic_shared()};
  const Lane lane;
  const int warp = threadIdx.x / 32;
  const Place place(p, blockIdx.x, query_tile_count, false);
  const int q0 = place.tile * kTile, head = place.head, batch = place.batch;
  const Sequence s = sequence_of(p, batch);
  if (q0 >= s.q_len) return;
  const float* sum = dq_fragments<kDim>(dq_tile(p, g.dq_sum, s, batch, head, q0, kDim), warp);
  float dq[2][kDim / 16][4];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) ptx::load_fragment(sum + 128 * (m * (kDim / 16) + n), lane.id, dq[m][n]);
  store_accumulator<T>(dq, {{p.scale, p.scale}, {p.scale, p.scale}}, tile, 32 * (warp / 2), kDim / 2 * (warp % 2),
                       lane);
  __syncthreads();
  T* out = static_cast<T*>(g.dq.data) + query_offset(g.dq, s, batch, head) + q0 * g.dq.seq;
  tile.template store_rows<16>(16 * warp, out, g.dq.seq, static_cast<int>(s.q_len) - q0, static_cast<int>(p.head_dim));
}

}  // namespace

void attention_bwd_sm80(const AttentionProblem& p, const AttentionGradients& g) {
  const int query_tile_count = static_cast<int>(ceil_div(p.seqlen_q, kTile)),
            key_tiles = static_cast<int>(ceil_div(p.seqlen_k, kTile));
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    launch<attention_bwd_dkv_sm80<T, kDim, kDropout>, BackwardTiles<T, kDim>::kBytes>(
        "attention_bwd_dkv_sm80", key_tiles * p.heads * p.batch, kThreads, p.stream, p, g, key_tiles);
    if (g.dq_sum != nullptr)
      launch<attention_bwd_store_dq<T, kDim>, Tile<T, kTile, kDim>::kBytes>(
          "attention_bwd_store_dq", query_tile_count * p.heads * p.batch, kThreads, p.stream, p, g, query_tile_count);
  });
}

}  // namespace flash_models
