// SPDX-License-Identifier: Apache-2.0
//
// From runtime values to a template instance.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

#include "ampere/launch.cuh"
#include "attention.h"
#include "numbers.h"

namespace flash_models {

// Calls fn.template operator()<T, kDim, kDropout>() with the smallest compiled head dimension that holds p.head_dim;
// the tiles are padded with zeros in shared memory.
template <typename T, typename Function>
void dispatch_dim(const AttentionProblem& p, Function fn) {
  auto with_dropout = [&]<int kDim>() {
    p.rng_state != nullptr ? fn.template operator()<T, kDim, true>() : fn.template operator()<T, kDim, false>();
  };
  if (p.head_dim <= 32) {
    with_dropout.template operator()<32>();
  } else if (p.head_dim <= 64) {
    with_dropout.template operator()<64>();
  } else if (p.head_dim <= 96) {
    with_dropout.template operator()<96>();
  } else {
    with_dropout.template operator()<128>();
  }
}

template <typename Function>
void dispatch(const AttentionProblem& p, Function fn) {
  if (p.dtype == DType::kFloat32)
    throw std::runtime_error("flash_models: the CUDA kernels take bfloat16 and float16, got float32; cast q, k and v");
  p.dtype == DType::kBFloat16 ? dispatch_dim<__nv_bfloat16>(p, fn) : dispatch_dim<__half>(p, fn);
}

inline int padded_dim(int64_t head_dim) {
  return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : 128;
}

// Lanes that hold a row of `dim` elements, 16 bytes each; at 96 some are to spare.
__host__ __device__ constexpr int lanes_of_row(int dim) { return dim <= 32 ? 4 : dim <= 64 ? 8 : 16; }

}  // namespace flash_models
