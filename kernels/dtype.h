// SPDX-License-Identifier: Apache-2.0
//
// The dtypes that kernels take, and what host and device code is marked with.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FM_HOST_DEVICE [[gnu::always_inline]] inline
#endif

namespace flash_models {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

}  // namespace flash_models
