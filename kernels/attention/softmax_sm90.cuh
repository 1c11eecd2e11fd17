// SPDX-License-Identifier: Apache-2.0
//
// Online softmax (see softmax.cuh) without a search for the maximum. The probabilities of a tile are computed against
// the reference point of the tiles before, and those of the first against 0; their sums, needed anyway, then tell
// whether a row has outgrown it or lies far below. That is rare: the maximum is then found, and what was accumulated
// rescaled.
#pragma once

#include "softmax.cuh"

namespace flash_models {

// State of the two rows that a lane shares with the other three lanes of its quad.
struct OptimisticSoftmax {
  // Between which a lane's sums of a tile may lie: a rounded P is exact enough there, and far from overflow.
  template <typename T>
  static constexpr float kMaxSum = std::is_same_v<T, __half> ? 0x1p10f : 0x1p40f;
  template <typename T>
  static constexpr float kMinSum = std::is_same_v<T, __half> ? 0x1p-6f : 0x1p-40f;
  float reference[2] = {0.0f, 0.0f};  // of scores * scale_log2; 0: nothing yet; -inf: no visible key so far
  float sum[2] = {0.0f, 0.0f};        // this lane's part of the sums of the tiles accepted
  float latest[2];                    // of the tile at hand

  // Turns scores into their logarithms to base 2 relative to `reference`.
  template <int kN>
  __device__ __forceinline__ void relate(float (&s)[1][kN][4], float scale_log2) const {
    const float shift[2] = {finite(reference[0]), finite(reference[1])};
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[0][n][i] = fmaf(s[0][n][i], scale_log2, -shift[i / 2]);
  }

  // The probabilities of related scores, rounded to the A operands of the products that follow. False where a row of
  // the warp has outgrown `reference`, has none or, in its first tile, lies far below: `move` it and try again, once.
  template <typename T, bool kFirst, int kN>
  __device__ __forceinline__ bool exponentiate(const float (&s)[1][kN][4], uint32_t (&a)[kN / 2][4]) {
    float total[2][2] = {};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = ptx::exp2_approx(s[0][n][2 * half]), y = ptx::exp2_approx(s[0][n][2 * half + 1]);
        total[half][n % 2] += x + y;
        a[n / 2][2 * (n % 2) + half] = pack<T>(x, y);
      }
    }
    bool held = true;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      latest[half] = total[half][0] + total[half][1];
      held = held && latest[half] <= kMaxSum<T> && (kFirst ? latest[half] >= kMinSum<T> : reference[half] != -INFINITY);
    }
    return !__any_sync(~0u, !held);
  }

  // There is no reference point yet, and 0 will not do.
  __device__ __forceinline__ void forget() { reference[0] = reference[1] = -INFINITY; }

  __device__ __forceinline__ void accept() { sum[0] += latest[0], sum[1] += latest[1]; }

  // Moves `reference`, and the related scores with it, to the largest score so far. What was accumulated is then to be
  // multiplied by `factor`.
  template <int kN>
  __device__ __forceinline__ void move(float (&s)[1][kN][4], float (&factor)[1][2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float next = fmaxf(reference[half], row_top(s[0], half) + finite(reference[half]));
      const float distance = finite(next) - finite(reference[half]);
#pragma unroll
      for (int n = 0; n < kN; ++n) s[0][n][2 * half] -= distance, s[0][n][2 * half + 1] -= distance;
      factor[0][half] = ptx::exp2_approx(reference[half] - finite(next));
      reference[half] = next;
      sum[half] *= factor[0][half];
    }
  }

  // Adds up the quad. Afterwards factor[0][half] normalises a row of the output, 0 for a row without a visible key.
  __device__ __forceinline__ void finish(float (&factor)[1][2], float keep_scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = quad_sum(sum[half]);
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
