// SPDX-License-Identifier: Apache-2.0
//
// Which kernels a CUDA call takes: those for Hopper on compute capability 9.0, the portable ones elsewhere.
#include "ampere/launch.cuh"
#include "attention.h"

namespace flash_models {
namespace {

bool on_hopper(const AttentionProblem& p) {
  // The copy engine does not describe an empty tensor; the portable kernels write the zeros that are asked for.
  return compute_capability() == 90 && p.total_q > 0 && p.total_k > 0;
}

}  // namespace

void attention_fwd_cuda(const AttentionProblem& p) { on_hopper(p) ? attention_fwd_sm90(p) : attention_fwd_sm80(p); }

void attention_bwd_cuda(const AttentionProblem& p, const AttentionGradients& g) { attention_bwd_sm80(p, g); }

int64_t dq_sum_size_cuda(const AttentionProblem& p) { return dq_sum_size_sm80(p); }

}  // namespace flash_models
