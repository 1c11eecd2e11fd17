// SPDX-License-Identifier: Apache-2.0
//
// Vectors of floats as wide as the instruction set this file is compiled for. The same sources are compiled once per
// instruction set; FM_ISA names the namespace, so that no function compiled for one can be linked in place of
// another's. For the same reason nothing here calls an inline function of the standard library.
#pragma once

#include <cstdint>

namespace flash_models::FM_ISA {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kWidth)));
using IntVec = int32_t __attribute__((vector_size(4 * kWidth)));

inline constexpr float kInfinity = __builtin_inff();

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// e^x for x <= 88 within 1.2 units in the last place; 0 where the result would be below the normal range, NaN for NaN.
inline Vec exp(Vec x) {
  // x = n ln 2 + f with |f| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer, n, in the low bits of the sum; 127
  // more makes these bits the exponent field of 2^n. ln 2 is in two parts, the first short enough for n times it to be
  // exact.
  constexpr float kRound = 12582912.0f + 127.0f;
  const Vec shifted = x * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec power = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(shifted) << 23);
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // 1 + f + f^2 times the minimax polynomial of degree 4 (relative error 3.1e-9 before rounding).
  Vec y = f * 1.381454003e-3f + 8.368745113e-3f;
  y = y * f + 4.166839079e-2f;
  y = y * f + 1.666652040e-1f;
  y = y * f + 4.999999343e-1f;
  y = y * f + 1.0f;
  y = y * f + 1.0f;
  return x < -87.0f ? Vec{} : y * power;
}

}  // namespace flash_models::FM_ISA
