// SPDX-License-Identifier: Apache-2.0
//
// Backward pass for Hopper (sm_90a; arXiv 2205.14135, Algorithm 4), after bwd_rows.cu two launches:
//   1. A CTA takes tiles of 64 * kWarpgroups keys, one after the other, and walks the query tiles that see them. One
//      warp is the producer, with dropout its warpgroup draws (draw.cuh), and a consumer warpgroup owns 64 keys. Scores
//      are computed transposed, so that P^T and dS^T lie in registers as the A operands of the products that follow;
//      dS^T alone also goes to shared memory, where dQ needs it from all keys:
//        S^T  = K Q^T        P^T  = exp2(scale log2(e) S^T - shift)      dV += P^T dO
//        dP^T = V dO^T       dS^T = P^T * (dP^T - delta)                 dK += scale dS^T Q      dQ += scale dS K
//   2. The fp32 sum of dQ, added up by the copy engine, is scaled and rounded. In deterministic mode 1. leaves dQ to
//      bwd_dq_sm80.cu.
//
//   dQ needs the dS^T of all consumers and waits for it until the next tile, so that none of them waits for another and
//   one's softmax runs under the products of the others:
//
//   tensor cores   S^T, dQ of the last tile | dP^T          |      | dV, dK             | S^T, dQ ...
//   other units                             | store dQ, P^T | dS^T | store dS^T, add dQ |
//
//   shared memory   bwd_shared_sm90.cuh
//   registers       S^T, dP^T 64 x kTileQ, dK, dV 64 x kDim, dQ 64 x kDqDim, fp32, per warpgroup
//   barriers        full, empty: as in fwd_sm90.cu; ds_full: all consumers have written dS^T
#include <algorithm>

#include "bwd_shared_sm90.cuh"
#include "dispatch.cuh"
#include "maps.h"
#include "partial.cuh"
#include "row_tiles.cuh"
#include "softmax.cuh"
#include "store_dq.cuh"

namespace flash_models {
namespace {

struct BackwardMaps {
  CUtensorMap q, k, v, dout;
};

// The keys of one tile, as producer and consumers both derive them.
template <typename Config>
struct KeyTile {
  const Sequence s;
  const int k0;
  const Visible visible;

  __device__ __forceinline__ KeyTile(const AttentionProblem& p, int tile, int batch)
      : s(sequence_of(p, batch)), k0(tile * Config::kTileK), visible(p, s) {}
};

// The list of key tiles. The first keys have most work: under a causal mask, and as the global tokens of many layouts.
struct Schedule {
  int key_tiles, count;

  __device__ __forceinline__ ListedWork work(const AttentionProblem& p, int number) const {
    if (p.columns.start != nullptr) return {p, p.columns, p.column_items, key_tiles, number};
    ListedWork whole;
    whole.place = Place(p, number, key_tiles, false);
    return whole;
  }
};

// What is kept of one tile of transposed scores after the other, by a drawer.
template <typename T, typename Config>
struct Drawer {
  const BackwardShared<T, Config> shared;
  const int lane = ptx::lane_id();
  Ring<Config::kKeptStages> drawn;

  __device__ __forceinline__ void operator()(const Dropout& dropout, int tile, int first_query) {
    constexpr int kRows = Config::kTileQ / 32, kColumns = Config::kTileK / 32;
    shared.kept().template fill<kRows, kColumns>(drawn, [&](int row, int column) {  // 32 queries x 32 keys
      shared.kept().word(drawn.stage, column, row, lane) =
          transposed(dropout.kept(first_query / 32 + row, tile * kColumns + column, lane));
    });
  }
};

template <typename T, typename Config>
__device__ __forceinline__ void produce(const AttentionProblem& p, const AttentionGradients& g,
                                        const BackwardMaps& maps, const Schedule& schedule) {
  constexpr int kTileQ = Config::kTileQ;
  const BackwardShared<T, Config> shared{ptx::swizzled_shared()};
  Producer producer{shared.raw()};
  Drawer<T, Config> drawer{shared};
  Ring<Config::kStages> ring;
  Ring<2> keys;
  Ring<1> values;
  for (int number; (number = take_ticket(g.ticket)) < schedule.count;) {
    const ListedWork work = schedule.work(p, number);
    const KeyTile<Config> tile(p, work.place.tile, work.place.batch);
    if (work.place.tile < 0 || tile.k0 >= tile.s.k_len) continue;
    const int head = work.place.head, batch = p.cu_seqlens_q != nullptr ? 0 : work.place.batch;
    const int q_len = static_cast<int>(tile.s.q_len), q_begin = static_cast<int>(tile.s.q_begin);
    const int key = static_cast<int>(tile.s.k_begin) + tile.k0;
    const int lo = tile.visible.lo - tile.k0, hi = tile.visible.hi - tile.k0;
    const int64_t rows = padded_row(p, tile.s, work.place.batch, head);
    const Tiles walk = query_tiles(p, tile.s, tile.visible, work.piece, tile.k0, Config::kTileK, kTileQ);
    const Dropout dropout(p, work.place.batch * p.heads + head);
    int position = walk.next(0);

    shared.k_ring().await_empty(keys);
    if (producer.leader)
      shared.notes().tile(keys.stage) = {work.place.tile, head, work.place.batch,
                                         2 * static_cast<int>(work.slot) + (position < walk.count)};
    producer.load(shared.k(keys.stage), maps.k, shared.k_ring().full(keys.stage), key, head, batch, lo, hi);
    keys.advance();
    if (position < walk.count) {
      shared.v_ring().await_empty(values);
      producer.load(shared.v(), maps.v, shared.v_ring().full(values.stage), key, head, batch, lo, hi);
      values.advance();
    }
    for (; position < walk.count; ring.advance()) {
      const int q0 = walk.tile(position) * kTileQ, stage = ring.stage;
      position = walk.next(position + 1);
      shared.q_ring().await_empty(ring);
      if (producer.leader) shared.notes().first(stage) = q0 + (position >= walk.count);
      const uint32_t full = shared.q_ring().full(stage);
      ptx::mbarrier_arrive_expect_warp(full, 2 * 4 * kTileQ);
      ptx::bulk_load_warp(shared.shift(stage), g.shift + rows + q0, 4 * kTileQ, full);
      ptx::bulk_load_warp(shared.delta(stage), g.delta + rows + q0, 4 * kTileQ, full);
      producer.load(shared.q(stage), maps.q, shared.q_ring().full(stage), q_begin + q0, head, batch, 0, q_len - q0);
      shared.dout_ring().await_empty(ring);
      producer.load(shared.dout(stage), maps.dout, shared.dout_ring().full(stage), q_begin + q0, head, batch, 0,
                    q_len - q0);
      if constexpr (Config::kDropout) drawer(dropout, work.place.tile, q0);
    }
  }
  shared.k_ring().await_empty(keys);
  if (producer.leader) {
    shared.notes().tile(keys.stage).end();
    ptx::mbarrier_arrive(shared.k_ring().full(keys.stage));
  }
}

template <typename T, typename Config>
__device__ __forceinline__ void follow(const AttentionProblem& p) {
  const BackwardShared<T, Config> shared{ptx::swizzled_shared()};
  follow_notes(p, shared.notes(), shared.k_ring(), shared.q_ring(), Drawer<T, Config>{shared});
}

template <typename T, typename Config>
__device__ __forceinline__ void consume(const AttentionProblem& p, const AttentionGradients& g) {
  constexpr bool kDropout = Config::kDropout;
  constexpr int kDim = Config::kDim, kTileQ = Config::kTileQ, kDqDim = Config::kDqDim, kN = kTileQ / 8;
  const BackwardShared<T, Config> shared{ptx::swizzled_shared()};
  const Lane lane{ptx::lane_id()};
  const int warpgroup = warpgroup_of_thread() - 1, warp = threadIdx.x % 128 / 32, row0 = 64 * warpgroup + 16 * warp;
  // This warpgroup's share of the dQ of a query tile.
  const int query0 = kTileQ == Config::kTileK ? 64 * warpgroup : 0, dim0 = kDqDim == kDim ? 0 : kDqDim * warpgroup;
  const float scale_log2 = p.scale * kLog2e;
  auto pair_of = [&](uint32_t rows, int n) {  // the values of this lane's two queries in fragment n
    return *static_cast<const float2*>(__cvta_shared_to_generic(rows + 4 * (8 * n + lane.col)));
  };

  float dk[1][kDim / 8][4], dv[1][kDim / 8][4];
  Ring<Config::kStages> ring;
  Ring<2> keys;
  Ring<1> values;
  Ring<Config::kKeptStages> drawn;
  Ring<2> written;  // dS^T of the last tile
  int buffer = 0;
  KeepTransposed<kN> keep;

  auto multiply_dq = [&](auto& dq, bool first) {
    if (!first) ptx::mbarrier_wait(shared.ds_full(written.stage), written.parity);
    ptx::wgmma_fence();
    multiply_transposed<T>(dq, shared.ds(written.stage), query0, shared.k(keys.stage), dim0);
    ptx::wgmma_commit();
    if (!first) written.advance();
  };
  // On its way to L2 dQ passes through shared memory, so that it leaves registers at once.
  const uint32_t dq_shared = shared.dq(4 * warpgroup + warp);
  auto store_dq = [&](const auto& dq) {
    ptx::bulk_wait_read_warp();
#pragma unroll
    for (int n = 0; n < kDqDim / 8; ++n)
      *static_cast<float4*>(__cvta_shared_to_generic(dq_shared + 512 * n + 16 * lane.id)) = {dq[0][n][0], dq[0][n][1],
                                                                                             dq[0][n][2], dq[0][n][3]};
  };

  while (true) {
    shared.k_ring().await_full(keys);
    const TileNote note = shared.notes().tile(keys.stage);
    if (note.last()) break;
    const KeyTile<Config> tile(p, note.tile, note.batch);
    const int k0 = tile.k0 + row0, q_len = static_cast<int>(tile.s.q_len);
    float* dq_sum =
        dq_tile(p, g.dq_sum, tile.s, note.batch, note.head, query0, kDim) + (4 * dim0 / kDqDim + warp) * 16 * kDqDim;
    auto add_dq = [&](int q0) {  // after a fence
      if (g.dq_sum != nullptr && q0 + query0 < q_len)
        ptx::bulk_add_warp(dq_sum + int64_t{q0} * kDim, dq_shared, BackwardShared<T, Config>::kWarpDqBytes);
    };
    auto await_queries = [&](const Ring<Config::kStages>& place) {
      shared.q_ring().await_full(place);
      const int word = shared.notes().first(place.stage);
      if constexpr (kDropout) {
        shared.kept().take(drawn, row0 / 32, lane.id, keep.word);
#pragma unroll
        for (uint32_t& bits : keep.word) bits <<= row0 % 32 / 8;  // this warp's two key fragments of four
      }
      return word;
    };
    clear(dk);
    clear(dv);
    int last_q0 = q_len, query = note.walks() ? await_queries(ring) : 1;  // no tile yet
    const bool walks = note.walks();
    while (walks) {
      const int q0 = query & ~1, stage = ring.stage;
      float scores[1][kN][4], dp[1][kN][4], dq[1][kDqDim / 8][4];
      ptx::wgmma_fence();
      multiply_rows<T>(scores, shared.k(keys.stage), 64 * warpgroup, shared.q(stage));
      ptx::wgmma_commit();
      multiply_dq(dq, last_q0 == q_len);
      ptx::wgmma_wait<0>();
      store_dq(dq);
      shared.v_ring().await_full(values);
      shared.dout_ring().await_full(ring);
      ptx::wgmma_fence();
      multiply_rows<T>(dp, shared.v(), 64 * warpgroup, shared.dout(stage));
      ptx::wgmma_commit();
      if (!tile.visible.all(q0, k0, 16) || q0 + kTileQ > q_len)
        mask_transposed(scores, tile.visible, q_len, q0, k0, lane);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float2 shift = pair_of(shared.shift(stage), n);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scores[0][n][i] = ptx::exp2_approx(fmaf(scores[0][n][i], scale_log2, -(i % 2 ? shift.y : shift.x)));
      }
      ptx::wgmma_wait<0>();
      const bool more = query % 2 == 0;
      if (!more) shared.v_ring().release(values);

      uint32_t probabilities[kN / 2][4], ds[kN / 2][4];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float2 delta = pair_of(shared.delta(stage), n);
        const uint32_t undropped = pack<T>(-delta.x, -delta.y);
        const float scale = kDropout ? p.keep_scale : 1.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float *prob = scores[0][n] + 2 * half, *dprob = dp[0][n] + 2 * half;
          const uint32_t kept = kDropout ? keep.mask(half, n) : ~0u, probability = pack<T>(prob[0], prob[1]);
          const uint32_t difference = pack<T>(fmaf(dprob[0], scale, -delta.x), fmaf(dprob[1], scale, -delta.y));
          ds[n / 2][2 * (n % 2) + half] = multiply_pairs<T>(probability, (difference & kept) | (undropped & ~kept));
          probabilities[n / 2][2 * (n % 2) + half] = probability & kept;
        }
      }

      ptx::wgmma_fence();
      multiply_columns<T>(dv, probabilities, shared.dout(stage), true);
      ptx::wgmma_commit();
      multiply_columns<T>(dk, ds, shared.q(stage), true);
      ptx::wgmma_commit();
      // What the other consumers still read of the buffer they have read before they wrote to the other one, and that
      // was waited for with dQ above.
#pragma unroll
      for (int k = 0; k < kN / 2; ++k) shared.ds(buffer).store_operand(row0, 16 * k, ds[k], lane.id);
      ptx::fence_proxy_async();
      ptx::mbarrier_arrive_warp(shared.ds_full(buffer));
      buffer ^= 1;
      add_dq(last_q0);
      last_q0 = q0;
      Ring<Config::kStages> next = ring;
      next.advance();
      if (more) query = await_queries(next);
      ptx::wgmma_wait<1>();
      ptx::mbarrier_arrive_warp(shared.dout_ring().empty(stage));
      ptx::wgmma_wait<0>();
      ptx::mbarrier_arrive_warp(shared.q_ring().empty(stage));
      ring = next;
      if (!more) break;
    }
    if (walks) {
      float dq[1][kDqDim / 8][4];
      multiply_dq(dq, false);
      ptx::wgmma_wait<0>();
      store_dq(dq);
      ptx::fence_proxy_async();
      __syncwarp();
      add_dq(last_q0);
    }
    const TileNote done = shared.notes().tile(keys.stage);  // read again, so that it need not be kept
    const Sequence s = sequence_of(p, done.batch);
    shared.k_ring().release(keys);

    if (done.slot() >= 0) {
      const float one[2] = {1.0f, 1.0f};
      float* partial = partial_of_warp(p, done.slot(), row0, partial_dkv_floats(kDim));
      store_partial(dk, one, partial, lane.id);
      store_partial(dv, one, partial + 16 * kDim, lane.id);
      continue;
    }
    const float dv_factor[1][2] = {{kDropout ? p.keep_scale : 1.0f, kDropout ? p.keep_scale : 1.0f}};
    const float dk_factor[1][2] = {{p.scale, p.scale}};
    const int rows = static_cast<int>(s.k_len) - k0, dims = static_cast<int>(p.head_dim);
    T* dk_out = static_cast<T*>(g.dk.data) + key_offset(g.dk, s, done.batch, done.head) + k0 * g.dk.seq;
    T* dv_out = static_cast<T*>(g.dv.data) + key_offset(g.dv, s, done.batch, done.head) + k0 * g.dv.seq;
    store_fragments<T>(dk, dk_factor, dk_out, g.dk.seq, rows, dims, lane);
    store_fragments<T>(dv, dv_factor, dv_out, g.dv.seq, rows, dims, lane);
  }
  ptx::bulk_wait_read_warp();
}

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    attention_bwd_sm90(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionGradients g,
                       const __grid_constant__ BackwardMaps maps, const __grid_constant__ Schedule schedule) {
  ptx::let_next_kernel_begin();
  if (threadIdx.x == 0) BackwardShared<T, Config>{ptx::swizzled_shared()}.init_barriers();
  ptx::await_previous_kernel();
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::lower_registers<Config::kProducerRegisters>();
    if (threadIdx.x < 32)
      produce<T, Config>(p, g, maps, schedule);
    else if constexpr (Config::kDropout)
      follow<T, Config>(p);
  } else {
    ptx::raise_registers<Config::kConsumerRegisters>();
    consume<T, Config>(p, g);
  }
}

template <typename T, typename Config>
void launch_backward(const AttentionProblem& p, const AttentionGradients& g) {
  using Shared = BackwardShared<T, Config>;
  const BackwardMaps maps{query_map<typename Shared::Query>(p, p.q), key_map<typename Shared::Key>(p, p.k),
                          key_map<typename Shared::Key>(p, p.v), query_map<typename Shared::Query>(p, g.dout)};
  const int key_tiles = static_cast<int>(ceil_div(p.seqlen_k, Config::kTileK));
  const int64_t count = p.columns.start != nullptr ? ListedWork::count(p, p.columns, p.column_items.count)
                                                   : key_tiles * p.heads * p.batch;
  if (count > 0x3FFFFFFF)
    throw std::runtime_error("flash_models: attention_bwd_sm90 takes fewer than 2^30 key tiles; split the batch");
  const int64_t ctas = std::min<int64_t>(count, Config::kCtasPerSm * multiprocessors());
  launch<attention_bwd_sm90<T, Config>, Shared::kBytes, true>("attention_bwd_sm90", ctas, Config::kThreads, p.stream, p,
                                                              g, maps, Schedule{key_tiles, static_cast<int>(count)});
  attention_bwd_combine_sm90(p, g);
  if (g.dq_sum == nullptr) return;
  const int query_tiles = static_cast<int>(ceil_div(p.seqlen_q, kStoredRows));
  launch<attention_bwd_store_dq_sm90<T, Config::kDim, Config::kDqDim>, 0, true>(
      "attention_bwd_store_dq_sm90", query_tiles * p.heads * p.batch, 128, p.stream, p, g, query_tiles);
}

}  // namespace

void attention_bwd_sm90(const AttentionProblem& p, const AttentionGradients& g) {
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    // A key tile must lie within one block column.
    if constexpr (kDim <= 64) {
      p.block_size == 64 ? launch_backward<T, BackwardConfig<kDim, 1, 64, kDropout>>(p, g)
                         : launch_backward<T, BackwardConfig<kDim, 2, 128, kDropout>>(p, g);
    } else if constexpr (kDim == 128) {
      launch_backward<T, BackwardConfig<kDim, 2, 64, kDropout>>(p, g);
    }
  });
}

}  // namespace flash_models
