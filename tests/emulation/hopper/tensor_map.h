// SPDX-License-Identifier: Apache-2.0
//
// kernels/hopper/tensor_map.h without a driver.
#pragma once

#include "ampere/launch.cuh"
#include "hopper/ptx.cuh"

namespace flash_models {

template <typename Tile>
CUtensorMap tensor_map(CUtensorMapDataType, const void* data, int64_t head_dim, int64_t seq, int64_t seq_stride,
                       int64_t heads, int64_t head_stride, int64_t batch, int64_t batch_stride) {
  const ptx::TensorView view{static_cast<char*>(const_cast<void*>(data)),
                             {head_dim, seq, heads, batch},
                             {seq_stride, head_stride, batch_stride},
                             Tile::kPanelDim,
                             Tile::kRows};
  CUtensorMap map;
  std::memcpy(&map, &view, sizeof(view));
  return map;
}

}  // namespace flash_models
