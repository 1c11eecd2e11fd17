// SPDX-License-Identifier: Apache-2.0
//
// Online softmax over key tiles (Milakov & Gimelshein 2018; FlashAttention, arXiv 2205.14135, Algorithm 1, lines 10-13)
// on accumulator fragments. Scores stay unscaled; the scale enters as scale * log2(e) inside one multiply-add of exp2.
#pragma once

#include "ampere/tile.cuh"
#include "blocks.cuh"

namespace flash_models {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// Sets the scores that do not attend to -inf.
template <int kM, int kN>
__device__ __forceinline__ void mask_scores(float (&s)[kM][kN][4], const Visible& visible, int q0, int k0, const Lane& lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!visible(q0 + 16 * m + 8 * (i / 2) + lane.row, k0 + 8 * n + lane.col + i % 2)) s[m][n][i] = -INFINITY;
}

// State of the rows a lane shares with the other three lanes of its quad: kM fragments of two rows each.
template <int kM>
struct OnlineSoftmax {
  float max[kM][2];  // running maximum of the unscaled scores
  float sum[kM][2];  // this lane's part of the running sum of exp2((s - max) * scale_log2)

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kM; ++m) max[m][0] = max[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.0f;
  }

  // Turns scores into probabilities relative to the new maximum and rescales what was accumulated under the old one.
  template <int kN, int kO>
  __device__ __forceinline__ void update(float (&s)[kM][kN][4], float (&out)[kM][kO][4], float scale_log2) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = max[m][half];
#pragma unroll
        for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        // A row without a visible key so far keeps max = -inf; subtracting 0 instead leaves exp2(-inf) = 0 and no NaN.
        const float shift = top == -INFINITY ? 0.0f : top * scale_log2;
        const float rescale = ptx::exp2_approx(max[m][half] * scale_log2 - shift);
        max[m][half] = top;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = ptx::exp2_approx(fmaf(s[m][n][i], scale_log2, -shift));
            total += s[m][n][i];
          }
        }
        sum[m][half] = fmaf(sum[m][half], rescale, total);
#pragma unroll
        for (int n = 0; n < kO; ++n) out[m][n][2 * half] *= rescale, out[m][n][2 * half + 1] *= rescale;
      }
    }
  }

  // Adds up the quad. Afterwards factor[m][half] normalises a row of the output, 0 for a row without a visible key.
  __device__ __forceinline__ void finish(float (&factor)[kM][2], float keep_scale) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += __shfl_xor_sync(~0u, sum[m][half], 1);
        sum[m][half] += __shfl_xor_sync(~0u, sum[m][half], 2);
        factor[m][half] = sum[m][half] == 0.0f ? 0.0f : keep_scale / sum[m][half];
      }
    }
  }

  __device__ __forceinline__ float lse(int m, int half, float scale) const {
    return sum[m][half] == 0.0f ? -INFINITY : max[m][half] * scale + __log2f(sum[m][half]) * kLn2;
  }
};

}  // namespace flash_models
