// SPDX-License-Identifier: Apache-2.0
//
// The problem's tensors as the copy engine sees them. A packed tensor is one sequence of all tokens.
#pragma once

#include "attention.h"
#include "hopper/tensor_map.h"

namespace flash_models {

template <typename Tile>
CUtensorMap token_map(const AttentionProblem& p, const View& v, int64_t seqlen, int64_t tokens) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const auto type = p.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return tensor_map<Tile>(type, v.data, p.head_dim, packed ? tokens : seqlen, v.seq, p.heads, v.head,
                          packed ? 1 : p.batch, v.batch);
}

template <typename Tile>
CUtensorMap query_map(const AttentionProblem& p, const View& v) {
  return token_map<Tile>(p, v, p.seqlen_q, p.total_q);
}

template <typename Tile>
CUtensorMap key_map(const AttentionProblem& p, const View& v) {
  return token_map<Tile>(p, v, p.seqlen_k, p.total_k);
}

}  // namespace flash_models
