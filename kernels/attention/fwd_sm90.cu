// SPDX-License-Identifier: Apache-2.0
//
// Forward pass for Hopper (sm_90a): FlashAttention (arXiv 2205.14135, Algorithm 1) on wgmma and the copy engine, with
// the warp specialisation and the two overlaps of FlashAttention-3 (arXiv 2407.08608, Sections 3.1 and 3.2).
//
// A CTA owns a tile of 64 * kWarpgroups queries of one head at a time. One warp is the planner: it finds out which tile
// comes next and leaves a note of it. One is the producer: it brings Q and keeps the rings of K and V tiles full; with
// dropout it plans too, and its warpgroup draws (draw.cuh). Each of kWarpgroups consumers owns 64 rows and all keys:
//
//   consumer 1   S1 = Q K1^T, O += P0 V0 | softmax S1             | S2 = Q K2^T, O += P1 V1 | softmax S2 ...
//   consumer 2   softmax S0              | S1 = Q K1^T, O += P0 V0 | softmax S1             | S2 = ...
//
// They take turns in issuing their products, so that one's softmax runs under the others' products.
//
//   shared memory   fwd_shared_sm90.cuh
//   registers       scores 64 x kTileK, output 64 x kDim, fp32, and probabilities 64 x kTileK, 16 bits, per warpgroup
//   barriers        full: the copy engine has written a tile. empty: every warp that reads it has.
//
// A consumer divides nothing and reads no lists: the note tells which rows these are and where they are written, the
// producer with every K where it begins. The first S of a tile is issued with the last P V of the one before, whose O
// then leaves from Q's place by the copy engine.
#include <algorithm>

#include "dispatch.cuh"
#include "fwd_plan_sm90.cuh"
#include "maps.h"
#include "partial.cuh"
#include "softmax_sm90.cuh"
#include "turns.cuh"

namespace flash_models {
namespace {

struct ForwardMaps {
  CUtensorMap q, k, v, out;
};

// What is kept of one tile of scores after the other, by a drawer.
template <typename T, typename Config>
struct Drawer {
  const ForwardShared<T, Config> shared;
  const int lane = ptx::lane_id();
  Ring<2> drawn;

  __device__ __forceinline__ void operator()(const Dropout& dropout, int tile, int first_key) {
    constexpr int kRows = Config::kTileQ / 32, kColumns = Config::kTileK / 64;
    shared.kept().template fill<kRows, kColumns>(drawn, [&](int row, int column) {  // 32 queries x 64 keys
      const int row_patch = tile * kRows + row, col_patch = first_key / 32 + 2 * column;
      const uint32_t patches[2] = {dropout.kept(row_patch, col_patch, lane),
                                   dropout.kept(row_patch, col_patch + 1, lane)};
      uint32_t words[2];
      KeepPacked<8>::split(patches, words);
#pragma unroll
      for (int half = 0; half < 2; ++half) shared.kept().word(drawn.stage, 2 * row + half, column, lane) = words[half];
    });
  }
};

template <typename T, typename Config>
__device__ __forceinline__ void produce(const AttentionProblem& p, const ForwardMaps& maps, const Schedule& schedule) {
  const ForwardShared<T, Config> shared{ptx::swizzled_shared()};
  Producer producer{shared.raw()};
  Drawer<T, Config> drawer{shared};
  Planner<T, Config> plan{p, schedule};  // for dropout, when the other warps have enough to do
  Ring<Config::kTileStages> tiles;
  Ring<Config::kStages> ring;
  while (true) {
    if constexpr (Config::kDropout) plan();
    shared.tile_ring().await_full(tiles);
    const QueryNote& note = shared.notes().tile(tiles.stage);
    if (note.last()) break;
    const int batch = p.cu_seqlens_q != nullptr ? 0 : note.batch;  // packed: one batch
    producer.load(shared.q(tiles.stage), maps.q, shared.q_full(tiles.stage), note.row, note.head, batch);
    tiles.advance();
    const Dropout dropout(p, note.batch * p.heads + note.head);
    const Tiles& walk = note.walk;
    if (!note.walks() && producer.leader) ptx::mbarrier_arrive(shared.wanted());
    for (int position = note.position; position < walk.count;) {
      const int k0 = walk.tile(position) * Config::kTileK;
      position = walk.next(position + 1);
      const bool last = position >= walk.count;
      if (last && producer.leader) ptx::mbarrier_arrive(shared.wanted());
      shared.k_ring().await_empty(ring);
      if (producer.leader) shared.notes().step(ring.stage) = Step::of(k0, last);
      producer.load(shared.k(ring.stage), maps.k, shared.k_ring().full(ring.stage), note.key + k0, note.head, batch);
      shared.v_ring().await_empty(ring);
      producer.load(shared.v(ring.stage), maps.v, shared.v_ring().full(ring.stage), note.key + k0, note.head, batch,
                    note.visible.lo - k0, note.visible.hi - k0);
      ring.advance();
      if constexpr (Config::kDropout) drawer(dropout, note.tile, k0);
    }
  }
  if (producer.leader) ptx::mbarrier_arrive(shared.q_full(tiles.stage));
}

template <typename T, typename Config>
__device__ __forceinline__ void follow(const AttentionProblem& p) {
  const ForwardShared<T, Config> shared{ptx::swizzled_shared()};
  follow_notes(p, shared.notes(), shared.tile_ring(), shared.k_ring(), Drawer<T, Config>{shared});
}

template <typename T, typename Config>
__device__ __forceinline__ void consume(const AttentionProblem& p, const ForwardMaps& maps) {
  constexpr bool kDropout = Config::kDropout;
  constexpr int kDim = Config::kDim, kTileK = Config::kTileK;
  const ForwardShared<T, Config> shared{ptx::swizzled_shared()};
  const Lane lane;
  const int warpgroup = warpgroup_of_thread() - 1, row0 = 64 * warpgroup + threadIdx.x % 128 / 32 * 16;
  Ring<Config::kTileStages> tiles, finished;
  Ring<Config::kStages> keys, values;
  Ring<2> drawn;
  bool leaving = false;  // out of the tile before
  KeepPacked<kTileK / 8> keep;
  float scores[1][kTileK / 8][4], out[1][kDim / 8][4], factor[1][2];
  uint32_t probabilities[kTileK / 16][4], query[kDim / 16][4];
  const Turns<Config::kWarpgroups> turns(warpgroup);

  auto load_query = [&] {
    if constexpr (Config::kQueryHeld) {
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) shared.q(tiles.stage).load_operand(row0, 16 * k, query[k], lane.id);
      ptx::wgmma_fence();
    }
  };
  auto multiply_qk = [&] {
    if constexpr (Config::kQueryHeld) {
      multiply_rows<T>(scores, query, shared.k(keys.stage));
    } else {
      multiply_rows<T>(scores, shared.q(tiles.stage), 64 * warpgroup, shared.k(keys.stage));
    }
    ptx::wgmma_commit();
  };
  auto multiply_pv = [&] {
    multiply_columns<T>(out, probabilities, shared.v(values.stage), true);
    ptx::wgmma_commit();
  };
  auto await_tile = [&] {  // with its first keys
    ptx::mbarrier_wait(shared.q_full(tiles.stage), tiles.parity);
    const TileNote note = shared.notes().tile(tiles.stage);
    if (note.walks()) shared.k_ring().await_full(keys);
    return note;
  };

  Step step;
  // What the products after those of `step` read. Even a wait that need not last takes 70 cycles; the answer to a
  // question comes under the exponentials.
  auto next_is_here = [&]() -> int {
    if constexpr (!Config::kAsks) return 1;
    return (shared.k_ring().is_full(keys) | step.last()) & shared.v_ring().is_full(values);
  };
  auto await_next = [&](const Ring<Config::kStages>& key, const Ring<Config::kStages>& value) {
    if (!step.last()) shared.k_ring().await_full(key);
    shared.v_ring().await_full(value);
  };
  auto begin_tile = [&](const TileNote& note, const Ring<Config::kStages>& value) {
    if (!note.walks()) return;
    step = shared.notes().step(keys.stage);
    if constexpr (!Config::kAsks) await_next(keys.next(), value);
  };
  TileNote note = await_tile();
  load_query();
  ptx::wgmma_fence();
  multiply_qk();  // in vain where there are no keys
  begin_tile(note, values);
  ptx::wgmma_wait<0>();
  while (!note.last()) {
    const auto place = shared.q(tiles.stage);
    const QueryNote& known = shared.notes().tile(tiles.stage);
    const Visible visible = known.visible;
    const int q0 = note.tile * Config::kTileQ + row0;
    OptimisticSoftmax softmax;
    clear(out);

    auto mask = [&](int k0) {
      if (!visible.all(q0, k0, kTileK)) mask_scores(scores, visible, q0, k0, lane);
    };
    auto exponentiate = [&]<bool kFirst>(std::bool_constant<kFirst>) {
      for (bool moved = false; !softmax.template exponentiate<T, kFirst>(scores, probabilities) && !moved;
           moved = true) {
        if (kFirst) softmax.forget();
        softmax.move(scores, factor);
        rescale(out, factor);
      }
      softmax.accept();
      if constexpr (kDropout) keep.drop(probabilities);
    };
    auto release_finished = [&] {
      if (!leaving) return;
      ptx::bulk_wait_read_warp();
      shared.tile_ring().release(finished);
    };
    auto take_keep = [&] {
      if constexpr (kDropout) shared.kept().take(drawn, row0 / 16, lane.id, keep.word);
    };

    if (note.walks()) {
      shared.k_ring().release(keys);
      take_keep();
      mask(step.first());
      softmax.relate(scores, p.scale_log2);
      release_finished();
      bool here = next_is_here();
      exponentiate(std::true_type{});
      if (!here) await_next(keys, values);
      while (!step.last()) {
        turns.take();
        ptx::wgmma_fence();
        multiply_qk();
        multiply_pv();
        if constexpr (!Config::kPassesLate) turns.pass();
        step = shared.notes().step(keys.stage);
        if constexpr (!Config::kAsks) await_next(keys.next(), values.next());
        take_keep();
        ptx::wgmma_wait<1>();
        shared.k_ring().release(keys);
        mask(step.first());
        softmax.relate(scores, p.scale_log2);
        ptx::wgmma_wait<0>();
        if constexpr (Config::kPassesLate) turns.pass();
        shared.v_ring().release(values);
        here = next_is_here();
        exponentiate(std::false_type{});
        if (!here) await_next(keys, values);
      }
    } else {
      release_finished();
    }
    const TileNote done = note;
    tiles.advance();
    note = await_tile();
    ptx::wgmma_fence();
    if (done.walks()) multiply_pv();
    load_query();
    multiply_qk();
    // Under these products the rest of the softmax, and what comes next.
    softmax.finish(factor, kDropout ? p.keep_scale : 1.0f);
    const bool second = lane.col & 2;  // two lanes of a quad write the lse of its two rows
    const int row = lane.row + 8 * second, rows = known.rows - row0;
    const float lse = softmax.lse(second);
    float* partial = partial_of_warp(p, done.slot(), row0, partial_out_floats(kDim));
    const bool piece = Config::kListed && done.slot() >= 0;
    if (piece) {
      if (lane.col < 4) partial[16 * kDim + row] = lse;
    } else if (lane.col < 4 && row < rows) {
      p.lse[known.lse + row0 + row] = lse;
    }
    begin_tile(note, done.walks() ? values.next() : values);
    ptx::wgmma_wait<1>();
    if (done.walks()) shared.v_ring().release(values);
    if (piece) {
      store_partial(out, factor[0], partial, lane.id);
    } else {
      // Q is not needed any more, and from its place out goes on by the copy engine.
      ptx::named_barrier_sync(4 + warpgroup, 128);
      store_operands<T>(place, row0, out, factor, lane.id);
      if (p.cu_seqlens_q == nullptr) {
        ptx::fence_proxy_async();
        __syncwarp();
        place.store_rows(maps.out, row0, known.row + row0, done.head, done.batch);
      } else {
        __syncwarp();
        place.copy_rows(static_cast<T*>(p.out.data) + known.out + row0 * p.out.seq, p.out.seq, row0, min(rows, 16),
                        static_cast<int>(p.head_dim));
      }
    }
    leaving = true;
    ptx::wgmma_wait<0>();
    if (piece) combine_out_if_last<T, kDim>(p, known, row0);
  }
  ptx::bulk_wait_read_warp();
}

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    attention_fwd_sm90(const __grid_constant__ AttentionProblem p, const __grid_constant__ ForwardMaps maps,
                       const __grid_constant__ Schedule schedule) {
  if (threadIdx.x == 0) ForwardShared<T, Config>{ptx::swizzled_shared()}.init_barriers();
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::lower_registers<Config::kProducerRegisters>();
    if (threadIdx.x < 32) {
      produce<T, Config>(p, maps, schedule);
    } else if constexpr (Config::kDropout) {
      follow<T, Config>(p);
    } else if (threadIdx.x < 64) {
      for (Planner<T, Config> plan{p, schedule}; plan();) {
      }
    }
  } else {
    ptx::raise_registers<Config::kConsumerRegisters>();
    consume<T, Config>(p, maps);
  }
}

// First launch where there is a layout. The forward kernel starts meanwhile.
constexpr int kZerosThreads = 256;

__global__ void attention_fwd_zeros(const __grid_constant__ AttentionProblem p) {
  ptx::let_next_kernel_begin();
  const int64_t i = blockIdx.x * int64_t{kZerosThreads} + threadIdx.x;
  if (i < p.zeros) p.ticket[i] = 0;
}

template <typename T, typename Config>
void launch_forward(const AttentionProblem& p) {
  using Shared = ForwardShared<T, Config>;
  const ForwardMaps maps{query_map<typename Shared::Query>(p, p.q), key_map<typename Shared::Key>(p, p.k),
                         key_map<typename Shared::Key>(p, p.v), query_map<typename Shared::Rows>(p, p.out)};
  const bool listed = p.rows.start != nullptr, alike = !listed && p.cu_seqlens_q == nullptr;
  const int64_t query_tiles = ceil_div(p.seqlen_q, Config::kTileQ);
  const int64_t units = listed ? ListedWork::count(p, p.rows, p.row_items.count) : query_tiles * p.heads * p.batch;
  if (units > 0x1FFFFFFF)
    throw std::runtime_error("flash_models: attention_fwd_sm90 takes fewer than 2^29 query tiles; split the batch");
  const int64_t at_once = Config::kCtasPerSm * multiprocessors();
  const int64_t ctas = listed || alike ? std::min<int64_t>(units, at_once) : units;
  const CausalDeal deal(query_tiles, p.heads * p.batch, at_once);
  const bool dealt = alike && p.causal;
  const Schedule schedule{static_cast<int>(query_tiles), dealt ? deal.count() : static_cast<int>(units), deal, dealt};
  auto launch_kernel = [&]<bool kEarly>(std::bool_constant<kEarly>) {
    launch<attention_fwd_sm90<T, Config>, Shared::kBytes, kEarly>("attention_fwd_sm90", ctas, Config::kThreads,
                                                                  p.stream, p, maps, schedule);
  };
  if (!listed) return launch_kernel(std::false_type{});
  launch<attention_fwd_zeros, 0>("attention_fwd_zeros", ceil_div(p.zeros, kZerosThreads), kZerosThreads, p.stream, p);
  launch_kernel(std::true_type{});
}

}  // namespace

void attention_fwd_sm90(const AttentionProblem& p) {
  dispatch(p, [&]<typename T, int kDim, bool kDropout>() {
    // Three consumers hide each other's waits best, but leave a thread 160 registers, too few for more head dimensions,
    // and the drawers 32. Their tiles of 192 rows must not cut the sequence badly, and they cut short ones along a
    // diagonal badly.
    constexpr bool kThreeFit = kDim <= 64 && !kDropout, kHeld = kDim == 128 && !kDropout;
    const int64_t rows_of_three = 192 * ceil_div(p.seqlen_q, 192), rows_of_two = 128 * ceil_div(p.seqlen_q, 128);
    const bool three = p.causal ? p.seqlen_q >= 4096 : 7 * rows_of_three <= 8 * rows_of_two;
    if (p.block_size == 64) {  // a query tile must lie within one block row
      launch_forward<T, ForwardConfig<kDim, 1, 64, kDropout>>(p);
    } else if (kHeld && p.seqlen_k >= 4096) {
      if constexpr (kHeld) launch_forward<T, ForwardConfig<kDim, 2, 128, false, true>>(p);
    } else if (!kThreeFit || p.block_size == 128 || !three) {
      launch_forward<T, ForwardConfig<kDim, 2, 128, kDropout>>(p);
    } else if constexpr (kThreeFit) {
      launch_forward<T, ForwardConfig<kDim, 3, 128, kDropout>>(p);
    }
  });
}

}  // namespace flash_models
