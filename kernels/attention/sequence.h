// SPDX-License-Identifier: Apache-2.0
//
// Lengths of one sequence of the batch and the keys its queries may see. Shared by the CPU and the CUDA kernels.
#pragma once

#include "attention.h"

namespace flash_models {

FM_HOST_DEVICE int64_t clamp_to(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : (x > hi ? hi : x); }

// Offsets and ranges come from the user's tensors, whose values are not read on the host when they live on the GPU:
// everything is clamped here, so that no value can make a kernel leave its tensors.
FM_HOST_DEVICE void limit_keys(const AttentionProblem& p, int64_t batch, Sequence& s) {
  s.key_lo = 0;
  s.key_hi = s.k_len;
  if (p.kv_range != nullptr) {
    s.key_lo = clamp_to(p.kv_range[2 * batch], 0, s.k_len);
    s.key_hi = clamp_to(p.kv_range[2 * batch + 1], s.key_lo, s.k_len);
  }
}

// Where sequences are not packed.
FM_HOST_DEVICE Sequence unpacked_sequence_of(const AttentionProblem& p, int64_t batch) {
  Sequence s;
  s.q_len = p.seqlen_q;
  s.k_len = p.seqlen_k;
  limit_keys(p, batch, s);
  return s;
}

FM_HOST_DEVICE Sequence sequence_of(const AttentionProblem& p, int64_t batch) {
  if (p.cu_seqlens_q == nullptr) return unpacked_sequence_of(p, batch);
  Sequence s;
  s.q_begin = clamp_to(p.cu_seqlens_q[batch], 0, p.total_q);
  s.k_begin = clamp_to(p.cu_seqlens_k[batch], 0, p.total_k);
  s.q_len = clamp_to(clamp_to(p.cu_seqlens_q[batch + 1], s.q_begin, p.total_q) - s.q_begin, 0, p.seqlen_q);
  s.k_len = clamp_to(clamp_to(p.cu_seqlens_k[batch + 1], s.k_begin, p.total_k) - s.k_begin, 0, p.seqlen_k);
  limit_keys(p, batch, s);
  return s;
}

// Row of lse and delta: (B, H, Sq) or, packed, (H, Tq).
FM_HOST_DEVICE int64_t lse_offset(const AttentionProblem& p, const Sequence& s, int64_t batch, int64_t head) {
  return p.cu_seqlens_q != nullptr ? head * p.total_q + s.q_begin : (batch * p.heads + head) * p.seqlen_q;
}

// Element offset of (sequence, head, token 0) in a query-side or key-side view.
FM_HOST_DEVICE int64_t query_offset(const View& v, const Sequence& s, int64_t batch, int64_t head) {
  return batch * v.batch + s.q_begin * v.seq + head * v.head;
}
FM_HOST_DEVICE int64_t key_offset(const View& v, const Sequence& s, int64_t batch, int64_t head) {
  return batch * v.batch + s.k_begin * v.seq + head * v.head;
}

}  // namespace flash_models
