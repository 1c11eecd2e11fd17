// SPDX-License-Identifier: Apache-2.0
//
// Forward pass for sm_80 and later: FlashAttention (arXiv 2205.14135, Algorithm 1) on mma.sync and cp.async.
//
// One CTA owns a tile of 32 * kWarps queries of one head; each warp owns 32 of its rows and all keys, so rows never
// meet across warps. K and V tiles stream through a two-stage cp.async ring: while tile i is computed, tile i + 1 is on
// its way.
//
//   shared memory   Q [32 kWarps x kDim] | K [2][kTileK x kDim] | V [2][kTileK x kDim]     (Q is reused for the output)
//   registers       scores 32 x kTileK, output 32 x kDim per warp, fp32
#include "dispatch.cuh"
#include "dropout.cuh"
#include "softmax.cuh"

namespace flash_models {
namespace {

template <int kDim_, int kWarps_>
struct ForwardConfig {
  static constexpr int kDim = kDim_, kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kTileQ = 32 * kWarps;  // 32 rows a warp: every K and V fragment read feeds two products
  static constexpr int kTileK = kDim <= 64 ? 64 : 32;
  static constexpr int kCtasPerSm =
      8 / kWarps;  // 255 registers a thread; the softmax of one CTA hides behind the other's products
};

template <typename T, typename Config>
struct ForwardTiles {
  using Query = Tile<T, Config::kTileQ, Config::kDim>;
  using Key = Tile<T, Config::kTileK, Config::kDim>;
  static constexpr int kBytes = Query::kBytes + 4 * Key::kBytes;
  uint32_t shared;

  __device__ __forceinline__ Query q() const { return {shared}; }
  __device__ __forceinline__ Key k(int stage) const { return {shared + Query::kBytes + stage * Key::kBytes}; }
  __device__ __forceinline__ Key v(int stage) const { return {shared + Query::kBytes + (2 + stage) * Key::kBytes}; }
};

template <typename T, typename Config, bool kDropout>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    attention_fwd_sm80(const __grid_constant__ AttentionProblem p, int query_tiles) {
  constexpr int kDim = Config::kDim, kTileQ = Config::kTileQ, kTileK = Config::kTileK, kThreads = Config::kThreads;
  const ForwardTiles<T, Config> tiles{ptx::dynamic_shared()};
  const Lane lane;
  const int warp = threadIdx.x / 32;

  // Most work first: the last queries under a causal mask, otherwise the first, the global tokens of many layouts.
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
  tiles.q().template load_async<kThreads>(q, p.q.seq, 0, q_len - q0, dim);
  int position = walk.next(0), stage = 0;
  if (position < walk.count) load_keys(position, stage);
  ptx::cp_async_commit();

  const int row0 = 32 * warp;  // this warp's rows of the tile
  float out[2][kDim / 8][4], factor[2][2];
  clear(out);
  OnlineSoftmax<2> softmax;
  const Dropout dropout(p, batch * p.heads + head);

  while (position < walk.count) {
    const int next = walk.next(position + 1);
    ptx::cp_async_wait<0>();
    __syncthreads();  // tile `position` has landed and every warp is done with the stage that the next load overwrites
    if (next < walk.count) load_keys(next, stage ^ 1);
    ptx::cp_async_commit();

    const int k0 = walk.tile(position) * kTileK;
    float scores[2][kTileK / 8][4];
    clear(scores);
    multiply<T, kDim, false, true>(scores, tiles.q(), row0, tiles.k(stage), 0, lane.id);
    if (!visible.all(q0 + row0, k0, kTileK)) mask_scores(scores, visible, q0 + row0, k0, lane);
    if (softmax.advance(scores, factor, p.scale_log2)) rescale(out, factor);
    softmax.exponentiate(scores, p.scale_log2);
    if constexpr (kDropout) {
      KeepBits<2, kTileK / 8> keep;
      keep.draw(dropout, q0 + row0, k0, lane);
      keep.drop(scores);
    }
    multiply_registers<T>(out, scores, tiles.v(stage), lane.id);

    position = next;
    stage ^= 1;
  }

  softmax.finish(factor, kDropout ? p.keep_scale : 1.0f);
  if (lane.id % 4 == 0) {
    float* lse = p.lse + lse_offset(p, s, batch, head);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = q0 + row0 + 16 * m + 8 * half + lane.row;
        if (row < q_len) lse[row] = softmax.lse(m, half, p.scale);
      }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // without a single key tile Q may still be landing
  store_accumulator<T>(out, factor, tiles.q(), row0, 0, lane);
  __syncwarp();
  T* o = static_cast<T*>(p.out.data) + query_offset(p.out, s, batch, head) + q0 * p.out.seq;
  tiles.q().template store_rows<32>(row0, o, p.out.seq, q_len - q0, dim);
}

template <typename T, int kDim, int kWarps, bool kDropout>
void launch_forward(const AttentionProblem& p) {
  using Config = ForwardConfig<kDim, kWarps>;
  const int query_tiles = static_cast<int>(ceil_div(p.seqlen_q, Config::kTileQ));
  launch<attention_fwd_sm80<T, Config, kDropout>, ForwardTiles<T, Config>::kBytes>(
      "attention_fwd_sm80", query_tiles * p.heads * p.batch, Config::kThreads, p.stream, p, query_tiles);
}

}  // namespace

void attention_fwd_sm80(const AttentionProblem& p) {
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    // A query tile must lie within one block row, so blocks of 64 take CTAs of two warps.
    p.block_size == 64 ? launch_forward<T, kDim, 2, kDropout>(p) : launch_forward<T, kDim, 4, kDropout>(p);
  });
}

}  // namespace flash_models
