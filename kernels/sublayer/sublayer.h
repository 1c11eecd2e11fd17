// SPDX-License-Identifier: Apache-2.0
//
// What the kernels receive that run between the matrix products of a model: plain pointers and sizes, already checked
// by op.cpp. flash_models/fused has the same in plain PyTorch, which is the definition.
#pragma once

#include "dtype.h"

namespace flash_models {

constexpr int kChunk = 8;                  // values that a thread takes at once
constexpr int64_t kMaxNormColumns = 8192;  // a row is held in the registers of one CTA

// Contiguous, on 16 bytes; nullptr where there is none.
struct Values {
  void* data = nullptr;
  DType dtype = DType::kFloat32;

  FM_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

// Rows of `columns` values, a multiple of kChunk.
struct Rows {
  int64_t count, columns;

  FM_HOST_DEVICE int chunks() const { return static_cast<int>(columns / kChunk); }
};

// A number of 16 bits below the threshold is dropped.
struct RowDropout {
  const int64_t* seed = nullptr;  // on the device; nullptr: keep all
  uint32_t threshold = 0;
  float scale = 1.0f;  // 65536 / (65536 - threshold)
};

// sum = residual + dropout(x + bias) and out = normal * weight + shift, where normal is the sum less its mean over its
// standard deviation. Without x, sum is the residual; without weight, there is no out.
struct NormForward {
  Rows rows;
  Values x, bias, residual, weight, shift;
  Values kept;  // the sum, or normal
  Values out;
  float* statistics;  // (2, rows): means and reciprocal standard deviations
  bool keep_sum;
  float eps;
  RowDropout dropout;
};

// Gradients of x, the residual, bias, weight and shift from those of sum and out, either of which may be missing.
struct NormBackward {
  Rows rows;
  Values dsum, dout, kept, weight;
  const float* statistics;
  bool kept_sum, has_bias;
  Values dx, dresidual;  // may be missing
  int quantities;        // summed over rows: dbias if has_bias, dweight and dshift if dout
  float* partial;        // (quantities, parts, columns)
  float* sums;           // (quantities, columns)
  RowDropout dropout;
};

// out = gelu(x + bias); dx and the sum of its rows, from dout.
struct Gelu {
  Rows rows;
  Values x, bias, out, dout, dx;
  float* partial;  // (parts, columns), as sums nullptr without a bias
  float* sums;     // (columns)
  bool tanh;
};

// Rows of logits, of which `vocabulary` are real, become the gradient of the summed cross-entropy. A label below 0 has
// no loss.
struct SoftmaxGradient {
  Rows rows;
  Values logits;
  const int64_t* labels;
  float* losses;
  int64_t vocabulary;
};

// How many rows of partial sums a call needs.
int64_t norm_bwd_parts_cuda(const Rows& rows);
int64_t gelu_bwd_parts_cuda(const Rows& rows);

void norm_fwd_cuda(const NormForward& n, void* stream);
void norm_bwd_cuda(const NormBackward& n, void* stream);
void gelu_fwd_cuda(const Gelu& g, void* stream);
void gelu_bwd_cuda(const Gelu& g, void* stream);
void softmax_gradient_cuda(const SoftmaxGradient& s, void* stream);

}  // namespace flash_models
