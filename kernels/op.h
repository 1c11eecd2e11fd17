// SPDX-License-Identifier: Apache-2.0
//
// The only file that includes torch. Everything used here is in torch's stable ABI of 2.11, so one library serves every
// later torch and every Python.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"

#ifdef FLASH_MODELS_CUDA
// Weak, because a torch without CUDA does not have it; there no CUDA tensor can reach the call.
#pragma weak aoti_torch_get_current_cuda_stream
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace flash_models {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// The dispatcher's values, as a boxed function gets them. TORCH_BOX does the same for a function of that many
// parameters, but copies every one of them.
struct Stack {
  StableIValue* next;

  template <typename T>
  T take() {
    return torch::stable::detail::to<T>(*next++);
  }
};

// The results of a boxed function, which take the place of its arguments.
template <typename... Results>
void give(StableIValue* values, const Results&... results) {
  ((*values++ = torch::stable::detail::from(results)), ...);
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ")";
  return text.str();
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "flash_models: ", name, " must be float32, bfloat16 or float16");
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.get_device() == b.get_device() && a.is_cpu() == b.is_cpu();
}

// As the CUDA kernels, which read so much at a time, need it.
inline bool on_16_bytes(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

inline Shape shape_vector(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

// torch::stable::new_empty for 2.9, which calls the operator; the one for 2.10 looks it up by its name every time.
inline Tensor empty_on(const Tensor& like, const Shape& shape, ScalarType dtype) {
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(), static_cast<int64_t>(shape.size()), &type,
                                                   nullptr, &device, like.get_device_index(), nullptr, &made));
  return Tensor(made);
}

// A result's memory with two dimensions exchanged, without the operator.
inline Tensor exchanged(const Tensor& t, int64_t one, int64_t other) {
  const auto old_strides = t.strides();
  Shape sizes = shape_vector(t), strides(old_strides.begin(), old_strides.end());
  std::swap(sizes[one], sizes[other]);
  std::swap(strides[one], strides[other]);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), t.dim(), sizes.data(), strides.data(), 0, &made));
  return Tensor(made);
}

inline Tensor zeros_on(const Tensor& like, const Shape& shape, ScalarType dtype) {
  Tensor zeros = empty_on(like, shape, dtype);
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(zeros.get()));
  return zeros;
}

// Makes a CUDA tensor's device the current one.
inline std::optional<torch::stable::accelerator::DeviceGuard> on_device_of(const Tensor& t) {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (t.is_cuda()) guard.emplace(t.get_device_index());
  return guard;
}

// The current stream of a CUDA tensor's device, a cudaStream_t; nullptr for others.
inline void* stream_of(const Tensor& t) {
  void* stream = nullptr;
#ifdef FLASH_MODELS_CUDA
  if (t.is_cuda()) TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
#endif
  return stream;
}

template <typename T>
const T* pointer_or_null(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

}  // namespace flash_models
