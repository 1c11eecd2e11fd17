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
// A warp that issues products does little else: no more than two are queued. So a consumer issues all of a step in one
// go, those of the next step's scores behind those of this step's gradients, and the rest of it runs under the products
// of the other, with which it takes turns at head dim 128. dQ needs the dS^T of both and waits for it until the next
// step, also where that belongs to other keys: the steps of all tiles are one chain.
//
//   tensor cores   dQ of the last step, dV, dK | S^T, dP^T of the next step |                      | dQ, dV, dK ...
//   other units                       store dQ |                            | add dQ, P^T and dS^T | (the other's turn)
//
//   shared memory   bwd_shared_sm90.cuh
//   registers       S^T, dP^T 64 x kTileQ, dK, dV 64 x kDim, dQ 64 x kDqDim, fp32, of a warpgroup; 16 columns of V
//   barriers        full, empty: as in fwd_sm90.cu; of dS^T, full: all consumers have written it
#include <algorithm>

#include "bwd_shared_sm90.cuh"
#include "dispatch.cuh"
#include "maps.h"
#include "partial.cuh"
#include "row_tiles.cuh"
#include "softmax.cuh"
#include "starts.cuh"
#include "store_dq.cuh"
#include "turns.cuh"

namespace flash_models {
namespace {

struct BackwardMaps {
  CUtensorMap q, k, v, dout;
};

// The list of key tiles. The first keys have most work: under a causal mask, and as the global tokens of many layouts.
struct Schedule {
  int key_tiles, count;
  uint64_t dq_policy;  // how L2 treats the sum of dQ

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
  constexpr int kTileQ = Config::kTileQ, kRowsBytes = BackwardShared<T, Config>::kRowsBytes;
  const BackwardShared<T, Config> shared{ptx::swizzled_shared()};
  Producer producer{shared.raw()};
  Drawer<T, Config> drawer{shared};
  Ring<Config::kStages> ring;
  Ring<2> keys;
  Ring<1> values;
  for (int number; (number = take_ticket(p.ticket)) < schedule.count;) {
    const ListedWork work = schedule.work(p, number);
    const CutLine line(p.column_items, work);
    const Place place = work.place;
    const Sequence s = sequence_of(p, place.batch);
    const int k0 = place.tile * Config::kTileK, rows = static_cast<int>(s.k_len) - k0;
    if (place.tile < 0 || rows <= 0) continue;
    const Visible visible(p, s);
    const int head = place.head, batch = p.cu_seqlens_q != nullptr ? 0 : place.batch;
    const int q_len = static_cast<int>(s.q_len), q_begin = static_cast<int>(s.q_begin);
    const int key = static_cast<int>(s.k_begin) + k0;
    const int64_t first_row = padded_row(p, s, place.batch, head);
    const Tiles walk = query_tiles(p, s, visible, work.piece, k0, Config::kTileK, kTileQ);
    const Dropout dropout(p, place.batch * p.heads + head);
    int position = walk.next(0);
    const bool walks = position < walk.count;
    const TileNote note{place.tile, head, place.batch, 2 * static_cast<int>(work.slot) + walks};
    shared.k_ring().await_empty(keys);
    if (producer.leader) shared.notes().tile(keys.stage) = {note, visible, q_len, rows, key, first_row / 64, line};
    const int lo = visible.lo - k0, hi = visible.hi - k0;
    if (walks) {
      producer.load(shared.k(keys.stage), maps.k, shared.k_ring().full(keys.stage), key, head, batch, lo, hi);
      shared.v_ring().await_empty(values);
      producer.load(shared.v(), maps.v, shared.v_ring().full(values.stage), key, head, batch, lo, hi);
      values.advance();
    } else if (producer.leader) {
      ptx::mbarrier_arrive(shared.k_ring().full(keys.stage));
    }
    keys.advance();
    for (; position < walk.count; ring.advance()) {
      const int q0 = walk.tile(position) * kTileQ, stage = ring.stage, token = q_begin + q0, left = q_len - q0;
      position = walk.next(position + 1);
      const bool masked = !visible.all(q0, k0, Config::kTileK) || kTileQ > left;
      shared.q_ring().await_empty(ring);
      if (producer.leader) shared.notes().step(stage) = Step::of(q0, position >= walk.count, masked);
      const uint32_t full = shared.q_ring().full(stage);
      const int64_t row = first_row + q0;
      ptx::mbarrier_arrive_expect_warp(full, kRowsBytes);
      if constexpr (Config::kDropout) {
        ptx::bulk_load_warp(shared.shift(stage), g.shift + row, 4 * kTileQ, full);
        ptx::bulk_load_warp(shared.delta(stage), g.delta + row, 4 * kTileQ, full);
      } else {
        ptx::bulk_load_warp(shared.starts(stage).base, static_cast<const Starts*>(g.starts) + row, kRowsBytes, full);
      }
      producer.load(shared.q(stage), maps.q, full, token, head, batch, 0, left);
      shared.dout_ring().await_empty(ring);
      producer.load(shared.dout(stage), maps.dout, shared.dout_ring().full(stage), token, head, batch, 0, left);
      if constexpr (Config::kDropout) drawer(dropout, place.tile, q0);
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
__device__ __forceinline__ void consume(const AttentionProblem& p, const AttentionGradients& g, uint64_t dq_policy) {
  constexpr bool kDropout = Config::kDropout;
  constexpr int kDim = Config::kDim, kTileQ = Config::kTileQ, kDqDim = Config::kDqDim, kN = kTileQ / 8;
  const BackwardShared<T, Config> shared{ptx::swizzled_shared()};
  const Lane lane{ptx::lane_id()};
  const int warpgroup = warpgroup_of_thread() - 1, warp = threadIdx.x % 128 / 32, row0 = 64 * warpgroup + 16 * warp;
  // This warpgroup's share of the dQ of a query tile.
  const int query0 = kTileQ == Config::kTileK ? 64 * warpgroup : 0, dim0 = kDqDim == kDim ? 0 : kDqDim * warpgroup;

  float scores[1][kN][4], dp[1][kN][4], dk[1][kDim / 8][4], dv[1][kDim / 8][4], dq[1][kDqDim / 8][4];
  uint32_t probabilities[kN / 2][4], ds[kN / 2][4];
  uint32_t value[4];  // of V, 16 columns that are not read from shared memory again: registers suffice for no more
  Ring<Config::kStages> ring;
  Ring<2> keys, behind;  // those of the scores; those of dQ
  Ring<1> values;
  Ring<Config::kKeptStages> drawn;
  KeepTransposed<kN> keep;
  Step query;
  // Tiles of dQ: that of the sequence's first queries, of the last step, and of what lies in shared memory; -1: none.
  int64_t dq_tile = 0, target = -1, stored = -1;
  const Turns<Config::kTurns> turns(warpgroup);

  auto pair_of = [&](uint32_t rows, int n) {  // the values of this lane's two queries in fragment n
    return *static_cast<const float2*>(__cvta_shared_to_generic(rows + 4 * (8 * n + lane.col)));
  };
  auto await_queries = [&] {
    shared.q_ring().await_full(ring);
    query = shared.notes().step(ring.stage);
  };
  // Issues S^T - shift / (scale log2(e)) and dP^T - delta (starts.cuh). With dropout, which needs delta apart, S^T,
  // dP^T.
  auto multiply_scores = [&] {
    ptx::wgmma_fence();
    if constexpr (!kDropout) start_from(scores, shared.starts(ring.stage), 0, lane);
    multiply_rows<T>(scores, shared.k(keys.stage), 64 * warpgroup, shared.q(ring.stage), !kDropout);
    ptx::wgmma_commit();
    shared.dout_ring().await_full(ring);
    ptx::wgmma_fence();
    if constexpr (!kDropout) {
      start_from(dp, shared.starts(ring.stage), 1, lane);
      ptx::wgmma<T, false>(dp, value, shared.dout(ring.stage).by_rows(0, 0), true);
    }
    multiply_rows<T>(dp, shared.v(), 64 * warpgroup, shared.dout(ring.stage), !kDropout, kDropout ? 0 : 16);
    ptx::wgmma_commit();
  };
  auto multiply_dv = [&] { multiply_columns<T>(dv, probabilities, shared.dout(ring.stage), true); };
  // Of the last step, whose dS^T lies in the other buffer; in vain where the chain begins.
  auto multiply_dq = [&] {
    if (target >= 0) shared.ds_ring().await_full({ring.stage ^ 1, ring.parity ^ (ring.stage == 0)});
    ptx::wgmma_fence();
    multiply_transposed<T>(dq, shared.ds(ring.stage ^ 1), query0, shared.k(behind.stage), dim0);
    ptx::wgmma_commit();
  };
  // On its way to L2 dQ passes through shared memory, so that it leaves registers at once.
  const uint32_t dq_shared = shared.dq(4 * warpgroup + warp);
  auto store_dq = [&] {
    ptx::bulk_wait_read_warp();
#pragma unroll
    for (int n = 0; n < kDqDim / 8; ++n)
      *static_cast<float4*>(__cvta_shared_to_generic(dq_shared + 512 * n + 16 * lane.id)) = {dq[0][n][0], dq[0][n][1],
                                                                                             dq[0][n][2], dq[0][n][3]};
    if (target >= 0) ptx::mbarrier_arrive_warp(shared.ds_ring().empty(ring.stage ^ 1));
    stored = target;
  };
  auto add_dq = [&] {
    if (stored < 0 || g.dq_sum == nullptr) return;
    ptx::fence_proxy_async();
    __syncwarp();
    ptx::bulk_add_warp(g.dq_sum + (stored * 64 + query0) * kDim + (4 * dim0 / kDqDim + warp) * 16 * kDqDim, dq_shared,
                       BackwardShared<T, Config>::kWarpDqBytes, dq_policy);
  };
  auto store_ds = [&](int k) { shared.ds(ring.stage).store_operand(row0, 16 * k, ds[k], lane.id); };
  // P^T and dS^T of the step whose scores are under way.
  auto differentiate = [&] {
    shared.ds_ring().await_empty(ring);
    ptx::wgmma_wait<1>();
    if (query.masked()) {
      const KeyNote& note = shared.notes().tile(keys.stage);
      mask_transposed(scores, note.visible, note.q_len, query.first(), note.tile * Config::kTileK + row0, lane);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 shift = kDropout ? pair_of(shared.shift(ring.stage), n) : float2{};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scores[0][n][i] = ptx::exp2_approx(fmaf(scores[0][n][i], p.scale_log2, -(i % 2 ? shift.y : shift.x)));
    }
    if constexpr (kDropout) {
      shared.kept().take(drawn, row0 / 32, lane.id, keep.word);
#pragma unroll
      for (uint32_t& bits : keep.word) bits <<= row0 % 32 / 8;  // this warp's two key fragments of four
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 delta = kDropout ? pair_of(shared.delta(ring.stage), n) : float2{};
      const uint32_t undropped = pack<T>(-delta.x, -delta.y);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float *prob = scores[0][n] + 2 * half, *dprob = dp[0][n] + 2 * half;
        const uint32_t kept = kDropout ? keep.mask(half, n) : ~0u, probability = pack<T>(prob[0], prob[1]);
        const uint32_t difference =
            kDropout ? pack<T>(fmaf(dprob[0], p.keep_scale, -delta.x), fmaf(dprob[1], p.keep_scale, -delta.y))
                     : pack<T>(dprob[0], dprob[1]);
        ds[n / 2][2 * (n % 2) + half] = multiply_pairs<T>(probability, (difference & kept) | (undropped & ~kept));
        probabilities[n / 2][2 * (n % 2) + half] = probability & kept;
      }
      if (!kDropout && n % 2 == 1) store_ds(n / 2);
    }
    if (query.last()) shared.v_ring().release(values);
  };
  // What this warp has of a tile's dK and dV.
  auto store_keys = [&](const KeyNote& note) {
    auto store = [&](const auto& acc, const View& view, float factor, int part) {
      const float factors[1][2] = {{factor, factor}}, one[2] = {1.0f, 1.0f};
      if (note.slot() >= 0) {
        float* partial = partial_of_warp(p, note.slot(), row0, partial_dkv_floats(kDim));
        store_partial(acc, one, partial + part * 16 * kDim, lane.id);
      } else {
        T* rows = static_cast<T*>(view.data) + note.batch * view.batch + note.head * view.head;
        store_fragments<T>(acc, factors, rows + (note.key + row0) * view.seq, view.seq, note.rows - row0,
                           static_cast<int>(p.head_dim), lane);
      }
    };
    store(dk, g.dk, p.scale, 0);
    store(dv, g.dv, kDropout ? p.keep_scale : 1.0f, 1);
    if (note.slot() >= 0) combine_keys_if_last<T, kDim>(p, g, note, row0);
  };

  auto begin_tile = [&] {
    clear(dk);
    clear(dv);
    dq_tile = shared.notes().tile(keys.stage).dq_tile;
    await_queries();
    shared.v_ring().await_full(values);
    if constexpr (!kDropout) shared.v().load_operand(row0, 0, value, lane.id);
    turns.take();
  };

  while (true) {  // a chain of tiles
    shared.k_ring().await_full(keys);
    const KeyNote& note = shared.notes().tile(keys.stage);
    if (note.last()) break;
    if (!note.walks()) {
      clear(dk);
      clear(dv);
      store_keys(note);
      shared.k_ring().release(keys);
      behind = keys;
      continue;
    }
    begin_tile();
    multiply_scores();
    turns.pass();
    differentiate();
    while (true) {
      const int stage = ring.stage;
      const bool last = query.last();
      if constexpr (kDropout)  // else at once, but registers do not suffice
#pragma unroll
        for (int k = 0; k < kN / 2; ++k) store_ds(k);
      turns.take();
      ptx::wgmma_fence();
      Config::kDqFirst ? multiply_dq() : multiply_dv();
      ptx::fence_proxy_async();  // dS^T, which the others need a step later: under a product
      ptx::mbarrier_arrive_warp(shared.ds_ring().full(stage));
      Config::kDqFirst ? multiply_dv() : multiply_dq();
      multiply_columns<T>(dk, ds, shared.q(stage), true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      store_dq();
      if (behind.stage != keys.stage) shared.k_ring().release(behind);
      target = dq_tile + query.first() / 64;
      ring.advance();
      if (!last) await_queries();
      ptx::wgmma_wait<0>();
      ptx::mbarrier_arrive_warp(shared.dout_ring().empty(stage));
      ptx::mbarrier_arrive_warp(shared.q_ring().empty(stage));
      if (last) {
        turns.pass();  // for others may have to release the keys before, so that the next come
        store_keys(shared.notes().tile(behind.stage));
        keys.advance();
        shared.k_ring().await_full(keys);
        if (!shared.notes().tile(keys.stage).walks()) break;
        begin_tile();
      }
      multiply_scores();
      turns.pass();
      add_dq();
      differentiate();
    }
    add_dq();
    multiply_dq();
    ptx::wgmma_wait<0>();
    store_dq();
    add_dq();
    target = -1;
    shared.k_ring().release(behind);
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
    consume<T, Config>(p, g, schedule.dq_policy);
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
  launch<attention_bwd_sm90<T, Config>, Shared::kBytes, true>(
      "attention_bwd_sm90", ctas, Config::kThreads, p.stream, p, g, maps,
      Schedule{key_tiles, static_cast<int>(count), dq_cache_policy(p, Config::kDim)});
  if (g.dq_sum != nullptr) store_dq<T, Config::kDim, Config::kDqDim>(p, g);
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
