// SPDX-License-Identifier: Apache-2.0
//
// Online softmax (see softmax.cuh) without a search for the maximum. The probabilities of a tile are computed against
// the reference point of the tiles before, in the registers of the scores; their sums, needed anyway, then tell whether
// a row has outgrown it. That is rare after a row's first tile. The tile's product is then computed again, the maximum
// found, and what was accumulated rescaled.
#pragma once

#include "ampere/tile.cuh"
#include "numbers.h"

namespace flash_models {

// State of the two rows that a lane shares with the other three lanes of its quad.
struct OptimisticSoftmax {
  static constexpr float kMaxSum = 1024.0f;     // P stays below 2^10, exact enough in 16 bits and far from overflow
  float reference[2] = {-INFINITY, -INFINITY};  // of scores * scale_log2; -inf: no visible key so far
  float sum[2] = {0.0f, 0.0f};                  // this lane's part of the sums of the tiles accepted
  float latest[2];                              // of the tile at hand

  // Turns scores into probabilities relative to `reference`. False where a row of this lane has outgrown it or has
  // none: the scores are then needed again, to `move` to.
  template <int kN>
  __device__ __forceinline__ bool exponentiate(float (&s)[1][kN][4], float scale_log2) {
    const float shift[2] = {finite(reference[0]), finite(reference[1])};
    float total[2][2] = {};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* x = s[0][n] + 2 * half;
        x[0] = ptx::exp2_approx(fmaf(x[0], scale_log2, -shift[half]));
        x[1] = ptx::exp2_approx(fmaf(x[1], scale_log2, -shift[half]));
        total[half][n % 2] += x[0] + x[1];
      }
    }
    bool held = true;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      latest[half] = total[half][0] + total[half][1];
      held = held && latest[half] <= kMaxSum && reference[half] != -INFINITY;
    }
    return held;
  }

  __device__ __forceinline__ void accept() { sum[0] += latest[0], sum[1] += latest[1]; }

  // Moves `reference` to the largest score so far. What was accumulated is then to be multiplied by `factor`.
  template <int kN>
  __device__ __forceinline__ void move(const float (&s)[1][kN][4], float (&factor)[1][2], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = s[0][0][2 * half];
#pragma unroll
      for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[0][n][2 * half], s[0][n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float next = fmaxf(reference[half], top * scale_log2);
      factor[0][half] = ptx::exp2_approx(reference[half] - finite(next));
      reference[half] = next;
      sum[half] *= factor[0][half];
    }
  }

  // Adds up the quad. Afterwards factor[0][half] normalises a row of the output, 0 for a row without a visible key.
  __device__ __forceinline__ void finish(float (&factor)[1][2], float keep_scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
      factor[0][half] = sum[half] == 0.0f ? 0.0f : __fdividef(keep_scale, sum[half]);
    }
  }

  __device__ __forceinline__ float lse(bool second) const {
    const float total = second ? sum[1] : sum[0];
    return total == 0.0f ? -INFINITY : ((second ? reference[1] : reference[0]) + __log2f(total)) * kLn2;
  }

 private:
  // Subtracting 0 where there is no reference leaves exp2(-inf) = 0 and no NaN.
  static __device__ __forceinline__ float finite(float reference) { return reference == -INFINITY ? 0.0f : reference; }
};

}  // namespace flash_models
