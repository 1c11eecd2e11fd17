// SPDX-License-Identifier: Apache-2.0
//
// Arithmetic that all kernels share.
#pragma once

#include "dtype.h"

namespace flash_models {

// The GPU exponentiates, and takes logarithms, to base 2.
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

FM_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace flash_models
