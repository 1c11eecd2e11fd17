// SPDX-License-Identifier: Apache-2.0
//
// Descriptions of global tensors for the copy engine (CUDA driver API, "Tensor Map Object Management"), made on the
// host for every launch.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "ampere/launch.cuh"

namespace flash_models {

// The driver's function, without linking the driver: a machine without one must be able to load this library.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("flash_models: the CUDA driver has no cuTensorMapEncodeTiled; it is older than CUDA 12");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// A (batch, seq, head, dim) tensor of 16-bit elements whose data and strides are multiples of 16 bytes, read in boxes
// that fill one panel of `Tile`.
template <typename Tile>
CUtensorMap tensor_map(CUtensorMapDataType type, const void* data, int64_t head_dim, int64_t seq, int64_t seq_stride,
                       int64_t heads, int64_t head_stride, int64_t batch, int64_t batch_stride) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(head_dim), cuuint64_t(seq), cuuint64_t(heads), cuuint64_t(batch)};
  // The stride of a dimension of one element is never used, but checked.
  auto bytes = [](int64_t size, int64_t stride) { return size == 1 ? cuuint64_t{16} : cuuint64_t(2 * stride); };
  const cuuint64_t strides[] = {bytes(seq, seq_stride), bytes(heads, head_stride), bytes(batch, batch_stride)};
  const cuuint32_t box[] = {Tile::kPanelDim, Tile::kRows, 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult result = tensor_map_encoder()(
      &map, type, 4, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      Tile::kRowBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("flash_models: the CUDA driver refused to describe a tensor (error " +
                             std::to_string(result) + ")");
  return map;
}

}  // namespace flash_models
