// SPDX-License-Identifier: Apache-2.0
//
// One head of one sequence, resolved by cpu_attention.cpp from strides, packed offsets and block lists, and the kernels
// that work on it: one set for each instruction set that the build compiled cpu_kernels.cpp for.
#pragma once

#include "attention.h"

namespace flash_models {

// tokens x head_dim, unit stride in the head dimension; `stride` elements from token to token.
struct Matrix {
  char* data = nullptr;
  int64_t stride = 0;
};

// Line i lists index[start[i]] .. index[start[i + 1] - 1]; start == nullptr lists everything.
struct BlockList {
  const int32_t* start = nullptr;
  const int32_t* index = nullptr;
};

constexpr int64_t kDqPad = 32;  // the products write whole panels of lanes, and up to so many rows more

struct Head {
  Matrix q, k, v, out;
  Matrix dout, dq, dk, dv;  // backward only
  float* lse = nullptr;     // one entry per query
  float* delta = nullptr;   // rowsum(dout * out), backward only
  float* dq_sum = nullptr;  // where one thread sums the dq of the whole head, in one sweep
  int64_t dq_stride = 0;    // its floats from query to query: head_dim, rounded up to kDqPad
  DType dtype = DType::kFloat32;
  int head_dim = 0;
  float scale = 1.0f;
  int64_t tile = 0;  // queries or keys in the lanes of one kernel call

  int64_t q_len = 0, k_len = 0;
  int64_t key_lo = 0, key_hi = 0;  // keys outside [key_lo, key_hi) are masked
  int64_t reach = 0;               // query i sees key j iff j <= i + reach: k_len - q_len if causal, else k_len
  BlockList rows, columns;
  int64_t block_size = 0;

  int64_t batch_head = 0;  // of the whole batch: batch * heads + head, a word of the dropout counter
  const int64_t* rng_state = nullptr;
  const uint32_t* threshold_zeros = nullptr;
  float keep_scale = 1.0f;
};

// Computes what tile number `tile` of the head owns: head.tile queries for forward (out, lse) and backward_queries (dq,
// delta), head.tile keys for backward_keys (dk, dv), which needs the delta of every query. In one sweep backward_keys
// adds to dq_sum, too; before it backward_rows computes delta alone, and after it backward_store dq.
using TileKernel = void (*)(const Head& head, int64_t tile, void* workspace);

struct CpuKernels {
  int64_t max_tile = 0;         // the largest Head::tile
  int64_t workspace_bytes = 0;  // scratch of one thread, aligned to 64 bytes, need not be initialised
  TileKernel forward = nullptr, backward_queries = nullptr, backward_keys = nullptr;
  TileKernel backward_rows = nullptr, backward_store = nullptr;
};

namespace baseline {
extern const CpuKernels kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

}  // namespace flash_models
