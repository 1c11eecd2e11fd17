// SPDX-License-Identifier: Apache-2.0
//
// The only file that includes torch. Everything used here is in torch's stable ABI of 2.11, so one library serves every
// later torch and every Python.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

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

inline Shape shape_vector(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  return strides;
}

// On the device of `like`. Allocates; torch::stable::new_empty looks its operator up by name every time.
inline Tensor empty_on(const Tensor& like, const Shape& shape, const Shape& strides, ScalarType dtype) {
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device, like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor empty_on(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return empty_on(like, shape, contiguous_strides(shape), dtype);
}

inline void zero(const Tensor& t) { STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.get())); }

inline Tensor zeros_on(const Tensor& like, const Shape& shape, ScalarType dtype) {
  Tensor zeros = empty_on(like, shape, dtype);
  zero(zeros);
  return zeros;
}

template <typename T>
const T* pointer_or_null(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

}  // namespace flash_models
