// SPDX-License-Identifier: Apache-2.0
//
// The CPU backend: resolves each head, picks the kernels for this processor and deals tiles out to the threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "attention.h"
#include "cpu_head.h"
#include "numbers.h"
#include "sequence.h"

namespace flash_models {
namespace {

const CpuKernels& kernels() {
#ifdef __x86_64__
  static const CpuKernels& best = __builtin_cpu_supports("x86-64-v4")   ? avx512::kernels
                                  : __builtin_cpu_supports("x86-64-v3") ? avx2::kernels
                                                                        : baseline::kernels;
  return best;
#else
  return baseline::kernels;
#endif
}

// All queries of a tile share one list of key blocks (and all keys one list of query blocks).
int64_t tile_size(const AttentionProblem& p) {
  return p.rows.start != nullptr ? std::min(p.block_size, kernels().max_tile) : kernels().max_tile;
}

Matrix matrix(const AttentionProblem& p, const View& v, int64_t offset) {
  const int64_t element_bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  return {static_cast<char*>(v.data) + offset * element_bytes, v.seq};
}

BlockList list_of(const BlockLists& lists, int64_t head) {
  return {lists.start == nullptr ? nullptr : lists.start + head * lists.head_stride, lists.index};
}

Head make_head(const AttentionProblem& p, const AttentionGradients* g, int64_t batch_head) {
  const int64_t batch = batch_head / p.heads, index = batch_head % p.heads;
  const Sequence s = sequence_of(p, batch);
  const auto queries = [&](const View& v) { return matrix(p, v, query_offset(v, s, batch, index)); };
  const auto keys = [&](const View& v) { return matrix(p, v, key_offset(v, s, batch, index)); };

  Head h;
  h.q = queries(p.q), h.k = keys(p.k), h.v = keys(p.v), h.out = queries(p.out);
  h.lse = p.lse + lse_offset(p, s, batch, index);
  if (g != nullptr) {
    h.dout = queries(g->dout), h.dq = queries(g->dq), h.dk = keys(g->dk), h.dv = keys(g->dv);
    h.delta = g->delta + lse_offset(p, s, batch, index);
  }
  h.dtype = p.dtype;
  h.head_dim = static_cast<int>(p.head_dim);
  h.scale = p.scale;
  h.tile = tile_size(p);
  h.q_len = s.q_len, h.k_len = s.k_len, h.key_lo = s.key_lo, h.key_hi = s.key_hi;
  h.reach = p.causal ? s.k_len - s.q_len : s.k_len;
  h.rows = list_of(p.rows, index), h.columns = list_of(p.columns, index);
  h.block_size = p.block_size;
  h.batch_head = batch_head;
  h.rng_state = p.rng_state, h.threshold_zeros = p.threshold_zeros, h.keep_scale = p.keep_scale;
  return h;
}

struct Work {
  const AttentionProblem& problem;
  const AttentionGradients* gradients;
  TileKernel kernel;
  int64_t tiles_per_head;
  std::vector<int32_t> order;  // of the tasks, task = (batch * heads + head) * tiles_per_head + tile
  int64_t more_bytes = 0;      // behind the kernels' workspace
  std::atomic<int64_t> next{0};

  int64_t size() const { return static_cast<int64_t>(order.size()); }

  void run() {
    constexpr std::align_val_t kAlignment{64};
    const auto release = [](void* p) { ::operator delete(p, kAlignment); };
    const std::unique_ptr<void, decltype(release)> workspace(
        ::operator new(static_cast<size_t>(kernels().workspace_bytes + more_bytes), kAlignment), release);
    for (int64_t at = next++; at < size(); at = next++) {
      const int64_t task = order[at];
      const Head head = make_head(problem, gradients, task / tiles_per_head);
      kernel(head, task % tiles_per_head, workspace.get());
    }
  }
};

// The order in which the threads take tiles: the longest first, or one that is started last keeps a single thread busy
// while the others wait. With a causal mask the last queries see the most keys, and the first keys are seen by the most
// queries; then the longest block lists, where there are any: a block of global tokens lists all others.
std::vector<int32_t> longest_first(const AttentionProblem& p, const BlockLists& lists, int64_t tiles_per_head,
                                   bool last_tile_first) {
  std::vector<int32_t> order(p.batch * p.heads * tiles_per_head);
  std::iota(order.begin(), order.end(), 0);
  const auto tile_of = [&](int32_t task) { return task % tiles_per_head; };
  if (last_tile_first) {
    for (int32_t& task : order) task += static_cast<int32_t>(tiles_per_head - 1 - 2 * tile_of(task));
  }
  if (lists.start == nullptr) return order;
  const auto length = [&](int32_t task) {
    const int32_t* start = lists.start + task / tiles_per_head % p.heads * lists.head_stride;
    const int64_t line = tile_of(task) * tile_size(p) / p.block_size;
    return start[line + 1] - start[line];
  };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return length(a) > length(b); });
  return order;
}

// Tiles cost very different amounts (causal, packed, block-sparse), so the threads take the next one from a counter
// instead of keeping to their share of the range. Whoever computes it, a tile's result is the same.
void run_tiles(Work& work) {
  parallel_for(work.size(), 1, [](void* context, int64_t, int64_t) { static_cast<Work*>(context)->run(); }, &work);
}

int64_t tiles_of(const AttentionProblem& p, int64_t seqlen) { return ceil_div(seqlen, tile_size(p)); }

int64_t dq_stride(int64_t head_dim) { return ceil_div(head_dim, kDqPad) * kDqPad; }

// The whole head, by one thread. Workspace: the kernels', then dq_sum.
void backward_head(const Head& resolved, int64_t, void* workspace) {
  const CpuKernels& k = kernels();
  Head head = resolved;
  head.dq_sum = reinterpret_cast<float*>(static_cast<char*>(workspace) + k.workspace_bytes);
  head.dq_stride = dq_stride(head.head_dim);
  std::fill_n(head.dq_sum, head.q_len * head.dq_stride, 0.0f);
  const auto each = [&](int64_t tokens, TileKernel kernel) {
    for (int64_t tile = 0; tile * head.tile < tokens; ++tile) kernel(head, tile, workspace);
  };
  each(head.q_len, k.backward_rows);
  each(head.k_len, k.backward_keys);
  each(head.q_len, k.backward_store);
}

}  // namespace

void attention_fwd_cpu(const AttentionProblem& p) {
  const int64_t tiles = tiles_of(p, p.seqlen_q);
  Work work{p, nullptr, kernels().forward, tiles, longest_first(p, p.rows, tiles, true)};
  run_tiles(work);
}

void attention_bwd_cpu(const AttentionProblem& p, const AttentionGradients& g) {
  const int64_t heads = p.batch * p.heads, threads = thread_count();
  // At most an eighth of the threads' time is lost to heads that do not divide evenly; two sweeps lose two sevenths.
  if (!p.deterministic && (heads % threads == 0 || heads >= 8 * threads)) {
    const int64_t floats = (p.seqlen_q + kDqPad) * dq_stride(p.head_dim);
    Work whole{p, &g, backward_head, 1, longest_first(p, {}, 1, false), 4 * floats};
    run_tiles(whole);
    return;
  }
  const int64_t q_tiles = tiles_of(p, p.seqlen_q), k_tiles = tiles_of(p, p.seqlen_k);
  Work queries{p, &g, kernels().backward_queries, q_tiles, longest_first(p, p.rows, q_tiles, true)};
  run_tiles(queries);
  Work keys{p, &g, kernels().backward_keys, k_tiles, longest_first(p, p.columns, k_tiles, false)};
  run_tiles(keys);
}

ForwardScratch forward_scratch_cpu(const AttentionProblem&) { return {0, 0}; }

BackwardScratch backward_scratch_cpu(const AttentionProblem& p) {
  return {p.heads * (p.cu_seqlens_q != nullptr ? p.total_q : p.batch * p.seqlen_q), 0, 0, 0, 0};
}

}  // namespace flash_models
