// SPDX-License-Identifier: Apache-2.0
//
// Rows of float32, bfloat16 or float16 to float32 and back, rounded to nearest even. Plain loops over bit patterns,
// which the compiler vectorises on every instruction set.
#pragma once

#include <cstddef>

#include "attention/attention.h"
#include "vector.h"

namespace flash_models::FM_ISA {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_bfloat16(uint16_t h) { return float_of(uint32_t{h} << 16); }

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40u : rounded);
}

inline float from_float16(uint16_t h) {
  // Moved into place, exponent and fraction read as the value divided by 2^112, subnormals included. Infinity and NaN
  // come out of the product as large numbers, whose exponent is then filled up.
  const uint32_t magnitude = (h & 0x7FFFu) << 13;
  const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
  const uint32_t value = bits_of(float_of(magnitude) * 0x1p112f) | special;
  return float_of(value | (h & 0x8000u) << 16);
}

inline uint16_t to_float16(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  // Normal: subtract 112 from the exponent and round off 13 bits. Subnormal: adding 1/2 lets the adder do the rounding.
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t value = magnitude < 0x38800000u ? subnormal : normal;
  value = magnitude >= 0x477FF000u ? 0x7C00u : value;  // 65520 and above round to infinity
  value = magnitude > 0x7F800000u ? 0x7E00u : value;
  return static_cast<uint16_t>(sign | value);
}

inline void read_row(DType dtype, const char* source, int64_t index, int count, float* row) {
  if (dtype == DType::kFloat32) {
    __builtin_memcpy(row, source + 4 * index, 4 * static_cast<size_t>(count));
    return;
  }
  const uint16_t* half = reinterpret_cast<const uint16_t*>(source) + index;
  if (dtype == DType::kBFloat16) {
    for (int i = 0; i < count; ++i) row[i] = from_bfloat16(half[i]);
  } else {
    for (int i = 0; i < count; ++i) row[i] = from_float16(half[i]);
  }
}

inline void write_row(DType dtype, char* target, int64_t index, int count, const float* row) {
  if (dtype == DType::kFloat32) {
    __builtin_memcpy(target + 4 * index, row, 4 * static_cast<size_t>(count));
    return;
  }
  uint16_t* half = reinterpret_cast<uint16_t*>(target) + index;
  if (dtype == DType::kBFloat16) {
    for (int i = 0; i < count; ++i) half[i] = to_bfloat16(row[i]);
  } else {
    for (int i = 0; i < count; ++i) half[i] = to_float16(row[i]);
  }
}

}  // namespace flash_models::FM_ISA
