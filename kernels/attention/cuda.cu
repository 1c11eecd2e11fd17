// SPDX-License-Identifier: Apache-2.0
//
// Which kernels a CUDA call takes: those for Hopper on compute capability 9.0, the portable ones elsewhere.
#include "dispatch.cuh"
#include "partial.cuh"
#include "row_tiles.cuh"

namespace flash_models {
namespace {

bool on_hopper(const AttentionProblem& p) {
  // The copy engine does not describe an empty tensor; the portable kernels write the zeros that are asked for.
  return compute_capability() == 90 && p.total_q > 0 && p.total_k > 0;
}

// Head dimension 96 has no even split of dQ over two warpgroups, and 128 does not fit one warpgroup's registers.
bool hopper_backward_fits(const AttentionProblem& p) {
  const int dim = padded_dim(p.head_dim);
  return dim != 96 && !(dim == 128 && p.block_size == 64);
}

}  // namespace

BackwardScratch backward_scratch_cuda(const AttentionProblem& p) {
  const bool hopper = on_hopper(p) && hopper_backward_fits(p);
  const int64_t rows = padded_rows(p), dim = padded_dim(p.head_dim);
  const int64_t starts = hopper && p.rng_state == nullptr ? rows : 0;
  const int64_t warps = hopper ? partial_warps(p, p.columns, p.column_items) : 0;
  return {rows, starts, p.deterministic ? 0 : rows * dim, 1 + warps, warps * partial_dkv_floats(dim)};
}

ForwardScratch forward_scratch_cuda(const AttentionProblem& p) {
  if (takes_decode(p)) return {decode_scratch(p), 0};
  if (!on_hopper(p) || p.rows.start == nullptr) return {0, 0};
  const int64_t warps = partial_warps(p, p.rows, p.row_items);
  return {warps * partial_out_floats(padded_dim(p.head_dim)), 1 + warps};
}

void attention_fwd_cuda(const AttentionProblem& p) {
  if (takes_decode(p)) return attention_fwd_decode(p);
  on_hopper(p) ? attention_fwd_sm90(p) : attention_fwd_sm80(p);
}

void attention_bwd_cuda(const AttentionProblem& p, const AttentionGradients& g) {
  attention_bwd_rows(p, g);
  on_hopper(p) && hopper_backward_fits(p) ? attention_bwd_sm90(p, g) : attention_bwd_sm80(p, g);
  if (p.deterministic) attention_bwd_dq_sm80(p, g);
}

}  // namespace flash_models
