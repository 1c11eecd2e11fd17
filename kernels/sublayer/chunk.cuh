// SPDX-License-Identifier: Apache-2.0
//
// Eight values of a row, which a thread reads, computes in float32 and writes at once, whatever their dtype. Which
// dtypes meet in a call is known at run time alone: what is uniform over a launch costs a predicate, where an instance
// for each of their combinations would cost minutes of compilation.
#pragma once

#include "ampere/launch.cuh"
#include "ampere/tile.cuh"
#include "philox.h"
#include "sublayer.h"

namespace flash_models {

// As they lie in memory: 16 bytes, or 32 of float32.
struct PackedChunk {
  uint4 low, high;
};

// Chunk `number` of a tensor. Loads alone, so that those of several chunks are under way before the first is used.
__device__ __forceinline__ PackedChunk load_chunk(const Values& from, int64_t number, bool valid = true) {
  PackedChunk packed{};
  if (!valid || !from) return packed;
  const bool wide = from.dtype == DType::kFloat32;
  const uint4* source = static_cast<const uint4*>(from.data) + (wide ? 2 * number : number);
  packed.low = source[0];
  if (wide) packed.high = source[1];
  return packed;
}

__device__ __forceinline__ void unpack(const PackedChunk& packed, DType dtype, float (&x)[kChunk]) {
  const uint32_t word[] = {packed.low.x,  packed.low.y,  packed.low.z,  packed.low.w,
                           packed.high.x, packed.high.y, packed.high.z, packed.high.w};
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = __uint_as_float(word[i]);
  } else if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = __uint_as_float(i % 2 ? word[i / 2] & 0xFFFF0000u : word[i / 2] << 16);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word[i]));
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
}

__device__ __forceinline__ void load_chunk(const Values& from, int64_t number, float (&x)[kChunk]) {
  unpack(load_chunk(from, number), from.dtype, x);
}

__device__ __forceinline__ void store_floats(float* to, const float (&x)[kChunk]) {
  float4* target = reinterpret_cast<float4*>(to);
  target[0] = {x[0], x[1], x[2], x[3]};
  target[1] = {x[4], x[5], x[6], x[7]};
}

__device__ __forceinline__ void store_chunk(const Values& to, int64_t number, const float (&x)[kChunk]) {
  if (to.dtype == DType::kFloat32) return store_floats(static_cast<float*>(to.data) + kChunk * number, x);
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    word[i] = to.dtype == DType::kBFloat16 ? pack<__nv_bfloat16>(x[2 * i], x[2 * i + 1])
                                           : pack<__half>(x[2 * i], x[2 * i + 1]);
  static_cast<uint4*>(to.data)[number] = {word[0], word[1], word[2], word[3]};
}

// Drops values of chunk `number` and scales the others: a call of Philox has 16 bits for each. The mask is a function
// of the seed and the place, so the backward draws it again.
__device__ __forceinline__ void drop(const RowDropout& dropout, int64_t number, float (&x)[kChunk]) {
  if (dropout.seed == nullptr) return;
  Philox words(static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32), 0, 0,
               static_cast<uint64_t>(*dropout.seed));
  words.rounds<Philox::kRounds>();
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const uint32_t drawn = i % 2 ? words.word[i / 2] >> 16 : words.word[i / 2] & 0xFFFF;
    x[i] = drawn < dropout.threshold ? 0.0f : x[i] * dropout.scale;
  }
}

}  // namespace flash_models
