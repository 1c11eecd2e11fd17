// SPDX-License-Identifier: Apache-2.0
//
// What products start from in Hopper's backward: S from -shift / (scale log2(e)) and dP from -delta of each query, so
// that nothing is left to subtract. Both are added by a product themselves, a row of ones times these numbers, for
// loads by 256 threads of two numbers for each fragment would take a seventh of shared memory's time. A product takes
// 16 bits an element, so each number is a sum of three: 24 bits, as many as it had. A row with an infinite number
// spoils what is computed of that query, and with it dK and dV, in all dimensions.
#pragma once

#include "ampere/tile.cuh"
#include "hopper/tile.cuh"

namespace flash_models {

// A query's 16 bytes: parts of the first number, 0, parts of the second, 0.
using Starts = uint4;

__device__ __forceinline__ uint2 split(float x) {
  const float high = __bfloat162float(__float2bfloat16_rn(x)), rest = x - high;
  const float middle = __bfloat162float(__float2bfloat16_rn(rest));
  return {pack<__nv_bfloat16>(high, middle), pack<__nv_bfloat16>(rest - middle, 0.0f)};
}

__device__ __forceinline__ Starts starts_of(float first, float second) {
  const uint2 a = split(first), b = split(second);
  return {a.x, a.y, b.x, b.y};
}

// acc = number `which` of each query, in all rows. Issues the product of one group.
template <int kN>
__device__ __forceinline__ void start_from(float (&acc)[1][kN][4], const NarrowTile<8 * kN>& starts, int which,
                                           const Lane& lane) {
  const int part = lane.col - 4 * which;  // this lane's columns of A: the first of its two
  const uint32_t ones = part == 0 ? 0x3F803F80 : part == 2 ? 0x00003F80 : 0;
  const uint32_t a[4] = {ones, ones, 0, 0};
  ptx::wgmma<__nv_bfloat16, false>(acc, a, starts.by_rows(), false);
}

}  // namespace flash_models
