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
  CUtensorMap q, k, v, dout, dk, dv;
};

// The list of key tiles. The first keys have most work: under a causal mask, and as the global tokens of many layouts.
// CTAs take tickets, and late, when the last queries of a tile are sent for: what is taken early is missing elsewhere
// in the end.
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

// Finds out what comes next and writes the notes of it, a tile ahead of all others.
template <typename T, typename Config>
struct Planner {
  const AttentionProblem& p;
  const AttentionGradients& g;
  const Schedule& schedule;
  const BackwardShared<T, Config> shared{ptx::swizzled_shared()};
  Ring<2> tiles;
  Ring<1> wanted;
  bool first = true;

  // The note of one tile; false when it says that none is left.
  __device__ __forceinline__ bool operator()() {
    if (!first) {
      ptx::mbarrier_wait(shared.wanted(), wanted.parity);
      wanted.advance();
    }
    first = false;
    for (int number; (number = take_ticket(g.ticket)) < schedule.count;) {
      const ListedWork work = schedule.work(p, number);
      const Place place = work.place;
      const int k0 = place.tile * Config::kTileK;
      if (place.tile < 0 || k0 >= sequence_of(p, place.batch).k_len) continue;
      write_note(shared, tiles, [&](KeyNote& note) {
        const Sequence s = sequence_of(p, place.batch);
        note.visible = Visible(p, s);
        note.walk = query_tiles(p, s, note.visible, work.piece, k0, Config::kTileK, Config::kTileQ);
        note.position = note.walk.next(0);
        note.tile = place.tile, note.head = place.head, note.batch = place.batch;
        note.slot_and_work = 2 * static_cast<int>(work.slot) + (note.position < note.walk.count);
        note.q_len = static_cast<int>(s.q_len);
        note.rows = static_cast<int>(s.k_len) - k0;
        note.row = static_cast<int>(s.k_begin) + k0;
        note.query = static_cast<int>(s.q_begin);
        note.queries = padded_row(p, s, place.batch, place.head);
        note.dk = key_offset(g.dk, s, place.batch, place.head) + k0 * g.dk.seq;
        note.dv = key_offset(g.dv, s, place.batch, place.head) + k0 * g.dv.seq;
      });
      return true;
    }
    write_note(shared, tiles, [](KeyNote& note) { note.end(); });
    return false;
  }
};

template <typename T, typename Config>
__device__ __forceinline__ void produce(const AttentionProblem& p, const AttentionGradients& g,
                                        const BackwardMaps& maps) {
  constexpr int kTileQ = Config::kTileQ;
  const BackwardShared<T, Config> shared{ptx::swizzled_shared()};
  Producer producer{shared.raw()};
  Drawer<T, Config> drawer{shared};
  Ring<Config::kStages> ring;
  Ring<2> tiles;
  Ring<1> values;
  while (true) {
    shared.tile_ring().await_full(tiles);
    const KeyNote& note = shared.notes().tile(tiles.stage);
    if (note.last()) break;
    const int batch = p.cu_seqlens_q != nullptr ? 0 : note.batch;  // packed: one batch
    const int k0 = note.tile * Config::kTileK, lo = note.visible.lo - k0, hi = note.visible.hi - k0;
    producer.load(shared.k(tiles.stage), maps.k, shared.k_full(tiles.stage), note.row, note.head, batch, lo, hi);
    tiles.advance();
    if (note.walks()) {
      shared.v_ring().await_empty(values);
      producer.load(shared.v(), maps.v, shared.v_ring().full(values.stage), note.row, note.head, batch, lo, hi);
      values.advance();
    }
    const Dropout dropout(p, note.batch * p.heads + note.head);
    const Tiles& walk = note.walk;
    if (!note.walks() && producer.leader) ptx::mbarrier_arrive(shared.wanted());
    for (int position = note.position; position < walk.count; ring.advance()) {
      const int q0 = walk.tile(position) * kTileQ, stage = ring.stage;
      position = walk.next(position + 1);
      const bool last = position >= walk.count;
      if (last && producer.leader) ptx::mbarrier_arrive(shared.wanted());
      shared.q_ring().await_empty(ring);
      if (producer.leader) shared.notes().first(stage) = q0 + last;
      producer.load(shared.q(stage), maps.q, shared.q_ring().full(stage), note.query + q0, note.head, batch, 0,
                    note.q_len - q0);
      shared.dout_ring().await_empty(ring);
      const uint32_t full = shared.dout_ring().full(stage);
      producer.load(shared.dout(stage), maps.dout, full, note.query + q0, note.head, batch, 0, note.q_len - q0);
      ptx::mbarrier_arrive_expect_warp(full, 2 * 4 * kTileQ);
      ptx::bulk_load_warp(shared.shift(stage), g.shift + note.queries + q0, 4 * kTileQ, full);
      ptx::bulk_load_warp(shared.delta(stage), g.delta + note.queries + q0, 4 * kTileQ, full);
      if constexpr (Config::kDropout) drawer(dropout, note.tile, q0);
    }
  }
  if (producer.leader) ptx::mbarrier_arrive(shared.k_full(tiles.stage));
}

// Warps 1 to 3 of the producer's warpgroup. The first of them plans; with dropout all draw.
template <typename T, typename Config>
__device__ __forceinline__ void follow(const AttentionProblem& p, const AttentionGradients& g,
                                       const Schedule& schedule) {
  const BackwardShared<T, Config> shared{ptx::swizzled_shared()};
  const Drawer<T, Config> drawer{shared};
  if (threadIdx.x < 64) {
    Planner<T, Config> plan{p, g, schedule};
    if constexpr (Config::kDropout) {
      plan();
      follow_notes(p, shared.notes(), shared.tile_ring(), shared.q_ring(), drawer, plan);
    } else {
      while (plan()) {
      }
    }
  } else if constexpr (Config::kDropout) {
    follow_notes(p, shared.notes(), shared.tile_ring(), shared.q_ring(), drawer, [] {});
  }
}

template <typename T, typename Config>
__device__ __forceinline__ void consume(const AttentionProblem& p, const AttentionGradients& g,
                                        const BackwardMaps& maps) {
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
  Ring<2> tiles;
  Ring<1> values;
  Ring<Config::kKeptStages> drawn;
  Ring<2> written;  // dS^T of the last tile
  int buffer = 0;
  KeepTransposed<kN> keep;

  auto multiply_dq = [&](auto& dq, bool first) {
    if (!first) ptx::mbarrier_wait(shared.ds_full(written.stage), written.parity);
    ptx::wgmma_fence();
    multiply_transposed<T>(dq, shared.ds(written.stage), query0, shared.k(tiles.stage), dim0);
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

  // The same way for dK and dV, rounded.
  auto store = [&](const auto& x, float scale, const CUtensorMap& map, const View& view, int64_t offset,
                   const KeyNote& note) {
    const typename BackwardShared<T, Config>::Rows staged{dq_shared};
    const float factor[1][2] = {{scale, scale}};
    ptx::bulk_wait_read_warp();
    store_operands<T>(staged, 0, x, factor, ptx::lane_id());  // addresses that are not kept from tile to tile
    if (p.cu_seqlens_k == nullptr) {
      ptx::fence_proxy_async();
      __syncwarp();
      staged.store_rows(map, 0, note.row + row0, note.head, note.batch);
    } else {
      __syncwarp();
      staged.copy_rows(static_cast<T*>(view.data) + offset + row0 * view.seq, view.seq, 0, min(note.rows - row0, 16),
                       static_cast<int>(p.head_dim));
      __syncwarp();
    }
  };

  while (true) {
    ptx::mbarrier_wait(shared.k_full(tiles.stage), tiles.parity);
    const KeyNote& note = shared.notes().tile(tiles.stage);
    if (note.last()) break;
    const Visible visible = note.visible;
    const int k0 = note.tile * Config::kTileK + row0, q_len = note.q_len;
    float* dq_sum = g.dq_sum + (note.queries + query0) * kDim + (4 * dim0 / kDqDim + warp) * 16 * kDqDim;
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
      multiply_rows<T>(scores, shared.k(tiles.stage), 64 * warpgroup, shared.q(stage));
      ptx::wgmma_commit();
      multiply_dq(dq, last_q0 == q_len);
      ptx::wgmma_wait<0>();
      store_dq(dq);
      shared.v_ring().await_full(values);
      shared.dout_ring().await_full(ring);
      ptx::wgmma_fence();
      multiply_rows<T>(dp, shared.v(), 64 * warpgroup, shared.dout(stage));
      ptx::wgmma_commit();
      if (!visible.all(q0, k0, 16) || q0 + kTileQ > q_len) mask_transposed(scores, visible, q_len, q0, k0, lane);
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
    if (note.slot() >= 0) {
      const float one[2] = {1.0f, 1.0f};
      float* partial = partial_of_warp(p, note.slot(), row0, partial_dkv_floats(kDim));
      store_partial(dk, one, partial, lane.id);
      store_partial(dv, one, partial + 16 * kDim, lane.id);
    } else {
      store(dv, kDropout ? p.keep_scale : 1.0f, maps.dv, g.dv, note.dv, note);
      store(dk, p.scale, maps.dk, g.dk, note.dk, note);
    }
    shared.tile_ring().release(tiles);
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
      produce<T, Config>(p, g, maps);
    else
      follow<T, Config>(p, g, schedule);
  } else {
    ptx::raise_registers<Config::kConsumerRegisters>();
    consume<T, Config>(p, g, maps);
  }
}

template <typename T, typename Config>
void launch_backward(const AttentionProblem& p, const AttentionGradients& g) {
  using Shared = BackwardShared<T, Config>;
  const BackwardMaps maps{query_map<typename Shared::Query>(p, p.q), key_map<typename Shared::Key>(p, p.k),
                          key_map<typename Shared::Key>(p, p.v),     query_map<typename Shared::Query>(p, g.dout),
                          key_map<typename Shared::Rows>(p, g.dk),   key_map<typename Shared::Rows>(p, g.dv)};
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
