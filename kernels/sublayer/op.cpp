// SPDX-License-Identifier: Apache-2.0
//
// Schemas, registration and checks of the ops that a model's sublayers are made of, apart from its matrix products. On
// CUDA alone: elsewhere flash_models/fused computes the same in plain PyTorch.
#include "op.h"
#include "sublayer.h"

#include <cmath>

#ifdef FLASH_MODELS_CUDA  // the dispatch key of the kernels: CUDA, or CPU in the tests that emulate a GPU
namespace flash_models {
namespace {

// `t` itself where its values lie as `Values` has them, or else a copy.
Tensor dense(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  return on_16_bytes(t) ? t : torch::stable::clone(t);
}
OptionalTensor dense(const OptionalTensor& t) { return t.has_value() ? OptionalTensor(dense(*t)) : t; }

Rows rows_of(const Tensor& t) {
  const int64_t columns = t.dim() > 0 ? t.size(t.dim() - 1) : 0;
  STD_TORCH_CHECK(columns > 0 && columns % kChunk == 0 && columns <= (int64_t{1} << 31) - kChunk,
                  "flash_models: the last dimension must be a multiple of ", kChunk, ", got shape ", shape_of(t));
  return {t.numel() / columns, columns};
}

// A tensor of `count` values on the device of `like`; absent ones are nullptr.
Values values_of(const OptionalTensor& t, const char* name, int64_t count, const Tensor& like) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(t->numel() == count && same_device(*t, like), "flash_models: ", name, " must have ", count,
                  " values on the device of the others, got shape ", shape_of(*t));
  return {const_cast<void*>(t->const_data_ptr()), dtype_of(*t, name)};
}

Values results(const Tensor& t, const char* name) { return {t.mutable_data_ptr(), dtype_of(t, name)}; }

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

RowDropout dropout_of(double p, const OptionalTensor& seed, const Tensor& like) {
  if (!seed.has_value()) return {};
  STD_TORCH_CHECK(
      p >= 0.0 && p <= 1.0 && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && same_device(*seed, like),
      "flash_models: dropout needs a probability of 0 to 1 and an int64 seed on the device of the others, "
      "got probability ",
      p);
  const auto threshold = static_cast<uint32_t>(std::lround(p * 65536));
  return {static_cast<const int64_t*>(seed->const_data_ptr()), threshold,
          threshold < 65536 ? 65536.0f / static_cast<float>(65536 - threshold) : 0.0f};
}

void norm_fwd(StableIValue* values, uint64_t, uint64_t) {
  Stack stack{values};
  const OptionalTensor x = dense(stack.take<OptionalTensor>()), bias = dense(stack.take<OptionalTensor>());
  const Tensor residual = dense(stack.take<Tensor>());
  const OptionalTensor weight = dense(stack.take<OptionalTensor>()), shift = dense(stack.take<OptionalTensor>());
  NormForward n{};
  n.eps = static_cast<float>(stack.take<double>());
  const double p = stack.take<double>();
  const OptionalTensor seed = stack.take<OptionalTensor>();
  n.keep_sum = stack.take<bool>();
  const ScalarType kept_dtype = stack.take<ScalarType>(), dtype = stack.take<ScalarType>();

  n.rows = rows_of(residual);
  const bool normed = weight.has_value();
  STD_TORCH_CHECK(
      normed == shift.has_value() && (n.keep_sum || (x.has_value() && normed)) && n.rows.columns <= kMaxNormColumns,
      "flash_models: norm_fwd needs weight and shift or neither, both and x where the sum is not kept, and "
      "at most ",
      kMaxNormColumns, " columns; got shape ", shape_of(residual));
  n.residual = values_of(residual, "residual", residual.numel(), residual);
  n.x = values_of(x, "x", residual.numel(), residual);
  n.bias = values_of(bias, "bias", n.rows.columns, residual);
  n.weight = values_of(weight, "weight", n.rows.columns, residual);
  n.shift = values_of(shift, "shift", n.rows.columns, residual);
  n.dropout = dropout_of(p, seed, residual);
  const auto guard = on_device_of(residual);
  const Shape shape = shape_vector(residual), none{0};
  const Tensor kept = empty_on(residual, x.has_value() ? shape : none, kept_dtype),
               out = empty_on(residual, normed ? shape : none, dtype),
               statistics = empty_on(residual, normed ? Shape{2, n.rows.count} : none, ScalarType::Float);
  n.kept = results(kept, "kept");
  n.out = results(out, "out");
  n.statistics = floats(statistics);
  norm_fwd_cuda(n, stream_of(residual));
  give(values, kept, out, statistics);
}

void norm_bwd(StableIValue* values, uint64_t, uint64_t) {
  Stack stack{values};
  const OptionalTensor dsum = dense(stack.take<OptionalTensor>()), dout = dense(stack.take<OptionalTensor>()),
                       kept = stack.take<OptionalTensor>(), statistics = stack.take<OptionalTensor>(),
                       weight = dense(stack.take<OptionalTensor>()), seed = stack.take<OptionalTensor>();
  const double p = stack.take<double>();
  NormBackward n{};
  n.kept_sum = stack.take<bool>();
  n.has_bias = stack.take<bool>();
  const bool needs_x = stack.take<bool>();
  const ScalarType x_dtype = stack.take<ScalarType>();
  const bool needs_residual = stack.take<bool>();
  const ScalarType residual_dtype = stack.take<ScalarType>();

  STD_TORCH_CHECK(dout.has_value() || dsum.has_value(), "flash_models: norm_bwd needs dsum, dout or both");
  const Tensor& like = dout.has_value() ? *dout : *dsum;
  n.rows = rows_of(like);
  n.dsum = values_of(dsum, "dsum", like.numel(), like);
  n.dout = values_of(dout, "dout", like.numel(), like);
  if (dout.has_value()) {
    STD_TORCH_CHECK(kept.has_value() && statistics.has_value() && weight.has_value() &&
                        statistics->scalar_type() == ScalarType::Float && kept->is_contiguous() &&
                        statistics->is_contiguous() && n.rows.columns <= kMaxNormColumns,
                    "flash_models: norm_bwd needs what norm_fwd kept, float32 statistics and a weight, of at most ",
                    kMaxNormColumns, " columns; got shape ", shape_of(like));
    n.kept = values_of(kept, "kept", like.numel(), like);
    n.weight = values_of(weight, "weight", n.rows.columns, like);
    values_of(statistics, "statistics", 2 * n.rows.count, like);
    n.statistics = static_cast<const float*>(statistics->const_data_ptr());
  }
  n.quantities = n.has_bias + 2 * dout.has_value();
  n.dropout = dropout_of(p, seed, like);
  const auto guard = on_device_of(like);
  const Shape shape = shape_vector(like), none{0};
  const Tensor dx = empty_on(like, needs_x ? shape : none, x_dtype),
               dresidual = empty_on(like, needs_residual ? shape : none, residual_dtype),
               sums = empty_on(like, {n.quantities, n.rows.columns}, ScalarType::Float),
               partial = empty_on(like, {n.quantities, norm_bwd_parts_cuda(n.rows), n.rows.columns}, ScalarType::Float);
  if (needs_x) n.dx = results(dx, "dx");
  if (needs_residual) n.dresidual = results(dresidual, "dresidual");
  n.partial = floats(partial);
  n.sums = floats(sums);
  norm_bwd_cuda(n, stream_of(like));
  give(values, dx, dresidual, sums);
}

void gelu_fwd(StableIValue* values, uint64_t, uint64_t) {
  Stack stack{values};
  const Tensor x = dense(stack.take<Tensor>());
  const OptionalTensor bias = dense(stack.take<OptionalTensor>());
  Gelu g{};
  g.tanh = stack.take<bool>();
  g.rows = rows_of(x);
  g.x = values_of(x, "x", x.numel(), x);
  g.bias = values_of(bias, "bias", g.rows.columns, x);
  const auto guard = on_device_of(x);
  const Tensor out = empty_on(x, shape_vector(x), x.scalar_type());
  g.out = results(out, "out");
  gelu_fwd_cuda(g, stream_of(x));
  give(values, out);
}

void gelu_bwd(StableIValue* values, uint64_t, uint64_t) {
  Stack stack{values};
  const Tensor dout = dense(stack.take<Tensor>()), x = dense(stack.take<Tensor>());
  const OptionalTensor bias = dense(stack.take<OptionalTensor>());
  Gelu g{};
  g.tanh = stack.take<bool>();
  g.rows = rows_of(x);
  g.x = values_of(x, "x", x.numel(), x);
  g.dout = values_of(dout, "dout", x.numel(), x);
  g.bias = values_of(bias, "bias", g.rows.columns, x);
  const auto guard = on_device_of(x);
  const int64_t columns = bias.has_value() ? g.rows.columns : 0;
  const Tensor dx = empty_on(x, shape_vector(x), x.scalar_type()), sums = empty_on(x, {columns}, ScalarType::Float),
               partial = empty_on(x, {gelu_bwd_parts_cuda(g.rows), columns}, ScalarType::Float);
  g.dx = results(dx, "dx");
  g.partial = floats(partial);
  g.sums = floats(sums);
  gelu_bwd_cuda(g, stream_of(x));
  give(values, dx, sums);
}

void softmax_gradient_(StableIValue* values, uint64_t, uint64_t) {
  Stack stack{values};
  const Tensor logits = stack.take<Tensor>(), labels = dense(stack.take<Tensor>());
  SoftmaxGradient s{};
  s.vocabulary = stack.take<int64_t>();
  s.rows = rows_of(logits);
  STD_TORCH_CHECK(
      logits.is_contiguous() && on_16_bytes(logits) && labels.scalar_type() == ScalarType::Long &&
          labels.numel() == s.rows.count && same_device(labels, logits) && s.vocabulary > 0 &&
          s.vocabulary <= s.rows.columns,
      "flash_models: softmax_gradient_ needs contiguous logits and an int64 label for each row, got shapes ",
      shape_of(logits), " and ", shape_of(labels));
  const auto guard = on_device_of(logits);
  const Tensor losses = empty_on(logits, {s.rows.count}, ScalarType::Float);
  s.logits = results(logits, "logits");
  s.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  s.losses = floats(losses);
  softmax_gradient_cuda(s, stream_of(logits));
  give(values, losses);
}

}  // namespace
}  // namespace flash_models
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(flash_models, m) {
  m.def(
      "norm_fwd(Tensor? x, Tensor? bias, Tensor residual, Tensor? weight, Tensor? shift, float eps, float p, Tensor? "
      "seed, bool keep_sum, ScalarType kept_dtype, ScalarType dtype) -> (Tensor kept, Tensor out, Tensor statistics)");
  m.def(
      "norm_bwd(Tensor? dsum, Tensor? dout, Tensor? kept, Tensor? statistics, Tensor? weight, Tensor? seed, float p, "
      "bool kept_sum, bool has_bias, bool needs_x, ScalarType x_dtype, bool needs_residual, ScalarType residual_dtype) "
      "-> (Tensor dx, Tensor dresidual, Tensor sums)");
  m.def("gelu_fwd(Tensor x, Tensor? bias, bool tanh) -> Tensor");
  m.def("gelu_bwd(Tensor dout, Tensor x, Tensor? bias, bool tanh) -> (Tensor dx, Tensor dbias)");
  m.def("softmax_gradient_(Tensor(a!) logits, Tensor labels, int vocabulary) -> Tensor");
}

#ifdef FLASH_MODELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(flash_models, FLASH_MODELS_CUDA, m) {
  m.impl("norm_fwd", flash_models::norm_fwd);
  m.impl("norm_bwd", flash_models::norm_bwd);
  m.impl("gelu_fwd", flash_models::gelu_fwd);
  m.impl("gelu_bwd", flash_models::gelu_bwd);
  m.impl("softmax_gradient_", flash_models::softmax_gradient_);
}
#endif
