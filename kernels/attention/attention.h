// SPDX-License-Identifier: Apache-2.0
//
// What a backend receives: plain pointers, strides and sizes, already checked by op.cpp. No torch type crosses this
// line.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace flash_models {

// A (batch, seq, head, dim) tensor with unit stride in dim. Strides count elements. Packed sequences have batch stride
// 0 and are addressed through cu_seqlens. Offsets are 64-bit: B * S * H * D passes 2^31 at 64K tokens.
struct View {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t seq = 0;
  int64_t head = 0;
};

// Compressed rows: line i of head h lists index[start[h * head_stride + i]] .. index[start[h * head_stride + i + 1] -
// 1], ascending block numbers. head_stride is 0 when all heads share one list.
struct BlockLists {
  const int32_t* start = nullptr;
  const int32_t* index = nullptr;
  int64_t head_stride = 0;
};

// The lines of a layout cut into pieces (flash_models/_schedule.py): four numbers an item. Lines of one item have slot
// -1; the others leave partial results, at most max_slots for one sequence and the heads that share nothing.
struct WorkItems {
  const int32_t* items = nullptr;  // (count, 4): line, first and one-past-last position in BlockLists::index, slot
  int64_t count = 0, max_slots = 0;
};

struct AttentionProblem {
  View q, k, v, out;
  float* lse = nullptr;  // (B, H, Sq), or (H, Tq) when packed; natural logarithm, -inf where a row has no key

  int64_t batch = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  int64_t seqlen_q = 0;  // longest sequence when packed
  int64_t seqlen_k = 0;
  int64_t total_q = 0;  // tokens in q: B * Sq, or Tq when packed
  int64_t total_k = 0;

  const int32_t* cu_seqlens_q = nullptr;  // (B + 1), both or none
  const int32_t* cu_seqlens_k = nullptr;
  const int32_t* kv_range = nullptr;  // (B, 2): first and one-past-last valid key

  BlockLists rows;                    // key blocks of each query block; rows.start == nullptr means dense
  BlockLists columns;                 // query blocks of each key block
  WorkItems row_items, column_items;  // on CUDA, with a layout
  int64_t block_size = 0;

  const int64_t* rng_state = nullptr;  // (2): seed, offset; nullptr without dropout
  // A byte below the threshold is dropped. For each of its bits, the highest first, all ones where it is 0: constants
  // that the kernels take as operands.
  uint32_t threshold_zeros[8] = {};
  float keep_scale = 1.0f;  // 256 / (256 - threshold)

  float scale = 1.0f;
  float scale_log2 = 1.0f;  // scale * log2(e), but not 0, which would make NaN of scores that do not attend
  bool causal = false;
  bool deterministic = false;
  DType dtype = DType::kFloat32;
  void* stream = nullptr;    // cudaStream_t
  float* partial = nullptr;  // scratch, ForwardScratch::partial or BackwardScratch::partial floats; nullptr when 0
  // Scratch, integers that the first launch of a pass sets to 0, `zeros` in all: the next work item, in the forward
  // pass with a layout only, and after it how many pieces of a cut line are done (partial.cuh).
  int32_t* ticket = nullptr;
  int64_t zeros = 0;
};

// The backward pass also reads p.out and p.lse.
struct AttentionGradients {
  View dout, dq, dk, dv;
  float* delta = nullptr;   // scratch, BackwardScratch::rows floats: rowsum(dout * out)
  float* shift = nullptr;   // the same: lse * log2(e), in the form that the CUDA kernels subtract
  void* starts = nullptr;   // scratch, BackwardScratch::starts rows of 16 bytes (starts.cuh); nullptr when 0
  float* dq_sum = nullptr;  // scratch, BackwardScratch::dq_sum floats; nullptr when that is 0
};

// One sequence of the batch, as both backends see it.
struct Sequence {
  int64_t q_begin = 0, k_begin = 0;  // first token in the packed tensors, 0 otherwise
  int64_t q_len = 0, k_len = 0;
  int64_t key_lo = 0, key_hi = 0;  // valid keys [key_lo, key_hi)
};

void attention_fwd_cpu(const AttentionProblem& p);
void attention_bwd_cpu(const AttentionProblem& p, const AttentionGradients& g);
void attention_fwd_cuda(const AttentionProblem& p);
void attention_bwd_cuda(const AttentionProblem& p, const AttentionGradients& g);

// What the CUDA backend is made of (cuda.cu).
bool takes_decode(const AttentionProblem& p);       // whether attention_fwd_decode takes it, and does so faster
int64_t decode_scratch(const AttentionProblem& p);  // floats
void attention_fwd_decode(const AttentionProblem& p);
void attention_fwd_sm80(const AttentionProblem& p);
void attention_fwd_sm90(const AttentionProblem& p);
void attention_bwd_rows(const AttentionProblem& p,
                        const AttentionGradients& g);  // delta and shift; all others need them
void attention_bwd_sm80(const AttentionProblem& p, const AttentionGradients& g);
void attention_bwd_sm90(const AttentionProblem& p, const AttentionGradients& g);
void attention_bwd_dq_sm80(const AttentionProblem& p, const AttentionGradients& g);  // dq in a fixed order

// Floats of scratch that a forward pass needs for what several CTAs compute of one query, and AttentionProblem::zeros.
// None on the CPU.
struct ForwardScratch {
  int64_t partial, zeros;
};
ForwardScratch forward_scratch_cpu(const AttentionProblem& p);
ForwardScratch forward_scratch_cuda(const AttentionProblem& p);

// Floats of scratch that a backward pass needs: a value a row, twice; 16 bytes a row on Hopper without dropout, counted
// in rows; what dq is added up in across CTAs, which is nothing on the CPU and in deterministic mode;
// AttentionProblem::zeros; and partial dk and dv.
struct BackwardScratch {
  int64_t rows, starts, dq_sum, zeros, partial;
};
BackwardScratch backward_scratch_cpu(const AttentionProblem& p);
BackwardScratch backward_scratch_cuda(const AttentionProblem& p);

// torch's intra-op thread pool, and fn(begin, end) on it over [0, n) in chunks of at least `grain`. Defined in op.cpp.
int64_t thread_count();
void parallel_for(int64_t n, int64_t grain, void (*fn)(void* context, int64_t begin, int64_t end), void* context);

}  // namespace flash_models
