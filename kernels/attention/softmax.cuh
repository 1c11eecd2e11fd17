// SPDX-License-Identifier: Apache-2.0
//
// Online softmax over key tiles (Milakov & Gimelshein 2018; FlashAttention, arXiv 2205.14135, Algorithm 1, lines 10-13)
// on accumulator fragments. Scores stay unscaled; the scale enters as scale * log2(e) inside one multiply-add of exp2.
//
// The running maximum may lag: any reference point gives the same quotient, so it moves only once scores have outgrown
// it by far (P then stays below 2^8, exact enough in 16 bits and far from overflow). After a row's first tile that is
// rare, and a warp in which no row moves skips the rescaling of its output. The Hopper kernel goes one step further
// (softmax_sm90.cuh).
#pragma once

#include "ampere/tile.cuh"
#include "blocks.cuh"
#include "numbers.h"

namespace flash_models {

// Sets the scores that do not attend to -inf.
template <int kM, int kN>
__device__ __forceinline__ void mask_scores(float (&s)[kM][kN][4], const Visible& visible, int q0, int k0,
                                            const Lane& lane) {
  // A column is the lane's first plus a constant of the unrolled loops: two comparisons with an immediate for each.
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = q0 + 16 * m + 8 * half + lane.row, first = visible.lo - k0 - lane.col;
      const int last = min(visible.hi - 1, row + visible.diagonal) - k0 - lane.col;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (8 * n + i < first || 8 * n + i > last) s[m][n][2 * half + i] = -INFINITY;
    }
  }
}

// Sets the transposed scores that do not attend to -inf: rows are keys k0 .., columns queries q0 ...
template <int kN>
__device__ __forceinline__ void mask_transposed(float (&s)[1][kN][4], const Visible& visible, int q_len, int q0, int k0,
                                                const Lane& lane) {
  const int last = q_len - 1 - q0 - lane.col;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = k0 + 8 * half + lane.row;
    const int first = key >= visible.lo && key < visible.hi ? key - visible.diagonal - q0 - lane.col : 1 << 30;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (8 * n + i < first || 8 * n + i > last) s[0][n][2 * half + i] = -INFINITY;
  }
}

// Over the four lanes that hold a row: its largest score, and the sum of what each has.
template <int kN>
__device__ __forceinline__ float row_top(const float (&s)[kN][4], int half) {
  float x = s[0][2 * half];
#pragma unroll
  for (int n = 0; n < kN; ++n) x = fmaxf(x, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// State of the rows a lane shares with the other three lanes of its quad: kM fragments of two rows each.
template <int kM>
struct OnlineSoftmax {
  static constexpr float kMaxGrowthLog2 = 8.0f;
  float max[kM][2];  // reference point of the unscaled scores
  float sum[kM][2];  // this lane's part of the running sum of exp2((s - max) * scale_log2)

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kM; ++m) max[m][0] = max[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.0f;
  }

  // Moves `max` where the scores have outgrown it. If that is so for any row of the warp, returns true: what was
  // accumulated is then to be multiplied by `factor`.
  template <int kN>
  __device__ __forceinline__ bool advance(const float (&s)[kM][kN][4], float (&factor)[kM][2], float scale_log2) {
    float top[kM][2];
    bool outgrown = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[m][half] = row_top(s[m], half);
        outgrown = outgrown || (top[m][half] - max[m][half]) * scale_log2 > kMaxGrowthLog2;  // false for -inf - -inf
      }
    }
    if (!__any_sync(~0u, outgrown)) return false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float next = fmaxf(max[m][half], top[m][half]);
        factor[m][half] = ptx::exp2_approx(max[m][half] * scale_log2 - finite_shift(next, scale_log2));
        max[m][half] = next;
        sum[m][half] *= factor[m][half];
      }
    }
    return true;
  }

  // Turns scores into probabilities relative to `max`.
  template <int kN>
  __device__ __forceinline__ void exponentiate(float (&s)[kM][kN][4], float scale_log2) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shift = finite_shift(max[m][half], scale_log2);
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = ptx::exp2_approx(fmaf(s[m][n][i], scale_log2, -shift));
            total += s[m][n][i];
          }
        }
        sum[m][half] += total;
      }
    }
  }

  // Adds up the quad. Afterwards factor[m][half] normalises a row of the output, 0 for a row without a visible key.
  __device__ __forceinline__ void finish(float (&factor)[kM][2], float keep_scale) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] = quad_sum(sum[m][half]);
        factor[m][half] = sum[m][half] == 0.0f ? 0.0f : keep_scale / sum[m][half];
      }
    }
  }

  __device__ __forceinline__ float lse(int m, int half, float scale) const {
    return sum[m][half] == 0.0f ? -INFINITY : max[m][half] * scale + __log2f(sum[m][half]) * kLn2;
  }

 private:
  // A row without a visible key so far keeps max = -inf; subtracting 0 instead leaves exp2(-inf) = 0 and no NaN.
  static __device__ __forceinline__ float finite_shift(float max, float scale_log2) {
    return max == -INFINITY ? 0.0f : max * scale_log2;
  }
};

template <int kM, int kN>
__device__ __forceinline__ void rescale(float (&acc)[kM][kN][4], const float (&factor)[kM][2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] *= factor[m][i / 2];
}

}  // namespace flash_models
