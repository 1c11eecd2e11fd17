// SPDX-License-Identifier: Apache-2.0
//
// Schema, registration and the checks that both backends rely on. They refuse whatever ops.py would of q, k and v,
// which it looks at only after a refusal, to report it in terms of its arguments.
#include "op.h"
#include "attention.h"

#include <cmath>

#ifdef FLASH_MODELS_CUDA
// Weak, because a torch without CUDA does not have it; there no CUDA tensor can reach the call.
#pragma weak aoti_torch_get_current_cuda_stream
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace flash_models {
namespace {

// The arguments that attention_fwd and attention_bwd share, in schema order.
struct Arguments {
  Tensor q, k, v;
  std::optional<double> scale;
  bool causal, deterministic;
  OptionalTensor kv_range;
  double dropout_p;
  OptionalTensor rng_state, cu_seqlens_q, cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  OptionalTensor row_start, row_index, col_start, col_index, row_items, col_items;
  int64_t block_size;
};

// Every argument that Python passes costs 0.1 us, so what few calls need comes last and has a default.
#define FM_SHARED_SCHEMA                                                                                 \
  "Tensor q, Tensor k, Tensor v, float? scale, bool causal, bool deterministic, Tensor? kv_range=None, " \
  "float dropout_p=0., Tensor? rng_state=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "   \
  "SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, Tensor? row_start=None, Tensor? row_index=None, "       \
  "Tensor? col_start=None, Tensor? col_index=None, Tensor? row_items=None, Tensor? col_items=None, "     \
  "int block_size=0"

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "flash_models: q, k, v must be float32, bfloat16 or float16");
  }
}

View view_of(const Tensor& t, const char* name, bool packed) {
  STD_TORCH_CHECK(t.dim() == (packed ? 3 : 4), "flash_models: ", name, " must have ", packed ? 3 : 4,
                  " dimensions, got shape ", shape_of(t));
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.stride(last) == 1 || t.size(last) <= 1, "flash_models: the last dimension of ", name,
                  " must be contiguous");
  return {const_cast<void*>(t.const_data_ptr()), packed ? 0 : t.stride(0), t.stride(last - 2), t.stride(last - 1)};
}

const int32_t* int32_or_null(const OptionalTensor& t, const char* name, const Tensor& q) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous() && t->get_device() == q.get_device() &&
                      t->is_cpu() == q.is_cpu(),
                  "flash_models: ", name, " must be a contiguous int32 tensor on the device of q");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

BlockLists lists_of(const OptionalTensor& start, const OptionalTensor& index, int64_t lines, int64_t heads,
                    const Tensor& q) {
  if (!start.has_value()) return {};
  STD_TORCH_CHECK(start->dim() == 2 && (start->size(0) == 1 || start->size(0) == heads) && start->size(1) == lines + 1,
                  "flash_models: block list offsets must be (1 or ", heads, ", ", lines + 1, "), got ",
                  shape_of(*start));
  return {int32_or_null(start, "block list offsets", q), int32_or_null(index, "block list numbers", q),
          start->size(0) == 1 ? 0 : start->size(1)};
}

WorkItems items_of(const OptionalTensor& items, const BlockLists& lists, int64_t lines, int64_t heads,
                   const Tensor& q) {
  if (!items.has_value()) return {};
  const int64_t all_lines = lists.head_stride == 0 ? lines : lines * heads;
  STD_TORCH_CHECK(items->dim() == 2 && items->size(0) >= all_lines && items->size(1) == 4,
                  "flash_models: the work items of ", all_lines, " lines must be (at least as many, 4), got ",
                  shape_of(*items));
  return {int32_or_null(items, "work items", q), items->size(0), items->size(0) - all_lines};
}

AttentionProblem make_problem(const Arguments& a) {
  const bool packed = a.cu_seqlens_q.has_value();
  AttentionProblem p;
  p.q = view_of(a.q, "q", packed);
  p.k = view_of(a.k, "k", packed);
  p.v = view_of(a.v, "v", packed);
  p.dtype = dtype_of(a.q);
  STD_TORCH_CHECK(p.dtype != DType::kFloat32 || a.q.is_cpu(), "flash_models: float32 is for the CPU");
  STD_TORCH_CHECK(a.k.scalar_type() == a.q.scalar_type() && a.v.scalar_type() == a.q.scalar_type(),
                  "flash_models: q, k, v differ in dtype");
  STD_TORCH_CHECK(a.k.get_device() == a.q.get_device() && a.v.get_device() == a.q.get_device() &&
                      a.k.is_cpu() == a.q.is_cpu() && a.v.is_cpu() == a.q.is_cpu(),
                  "flash_models: q, k, v are on different devices");
  const int64_t last = a.q.dim() - 1;
  p.head_dim = a.q.size(last);
  p.heads = a.q.size(last - 1);
  STD_TORCH_CHECK(p.head_dim % 8 == 0 && p.head_dim >= 8 && p.head_dim <= 128,
                  "flash_models: head dim must be a multiple of 8 up to 128, got ", p.head_dim);
  for (const Tensor* t : {&a.k, &a.v})
    STD_TORCH_CHECK(t->size(last) == p.head_dim && t->size(last - 1) == p.heads &&
                        t->size(last - 2) == a.k.size(last - 2) && (packed || t->size(0) == a.q.size(0)),
                    "flash_models: q ", shape_of(a.q), " does not fit key or value ", shape_of(*t));
  p.seqlen_q = packed ? a.max_seqlen_q : a.q.size(1);
  p.seqlen_k = packed ? a.max_seqlen_k : a.k.size(1);
  p.batch = packed ? a.cu_seqlens_q->size(0) - 1 : a.q.size(0);
  p.total_q = packed ? a.q.size(0) : p.batch * p.seqlen_q;
  p.total_k = packed ? a.k.size(0) : p.batch * p.seqlen_k;
  STD_TORCH_CHECK(
      p.seqlen_q >= 0 && p.seqlen_k >= 0 && p.seqlen_q < (int64_t{1} << 30) && p.seqlen_k < (int64_t{1} << 30),
      "flash_models: sequence lengths must be in [0, 2^30)");
  p.cu_seqlens_q = int32_or_null(a.cu_seqlens_q, "cu_seqlens_q", a.q);
  p.cu_seqlens_k = int32_or_null(a.cu_seqlens_k, "cu_seqlens_k", a.q);
  STD_TORCH_CHECK(
      packed == a.cu_seqlens_k.has_value() && (!packed || (p.batch >= 0 && a.cu_seqlens_k->numel() == p.batch + 1)),
      "flash_models: cu_seqlens_q and cu_seqlens_k must both be given, with the same length");
  p.kv_range = int32_or_null(a.kv_range, "kv_range", a.q);
  STD_TORCH_CHECK(!a.kv_range.has_value() || a.kv_range->numel() == 2 * p.batch, "flash_models: kv_range must be (",
                  p.batch, ", 2)");
  if (a.row_start.has_value()) {
    STD_TORCH_CHECK(a.block_size == 64 || a.block_size == 128, "flash_models: block size must be 64 or 128, got ",
                    a.block_size);
    STD_TORCH_CHECK(a.row_index.has_value() && a.col_start.has_value() && a.col_index.has_value(),
                    "flash_models: a layout needs its four lists");
    p.block_size = a.block_size;
    STD_TORCH_CHECK(!a.q.is_cuda() || (a.row_items.has_value() && a.col_items.has_value()),
                    "flash_models: a layout on CUDA needs its work items");
    const int64_t row_count = (p.seqlen_q + a.block_size - 1) / a.block_size;
    const int64_t column_count = (p.seqlen_k + a.block_size - 1) / a.block_size;
    p.rows = lists_of(a.row_start, a.row_index, row_count, p.heads, a.q);
    p.columns = lists_of(a.col_start, a.col_index, column_count, p.heads, a.q);
    p.row_items = items_of(a.row_items, p.rows, row_count, p.heads, a.q);
    p.column_items = items_of(a.col_items, p.columns, column_count, p.heads, a.q);
  }
  if (a.dropout_p > 0.0) {
    STD_TORCH_CHECK(a.rng_state.has_value() && a.rng_state->numel() == 2 &&
                        a.rng_state->scalar_type() == ScalarType::Long && a.rng_state->get_device() == a.q.get_device(),
                    "flash_models: dropout needs rng_state, two int64 on the device of q");
    const double threshold = std::round(256.0 * a.dropout_p);
    p.dropout_threshold = threshold >= 255.0 ? 255u : static_cast<uint32_t>(threshold);
    p.keep_scale = 256.0f / static_cast<float>(256u - p.dropout_threshold);
    if (p.dropout_threshold > 0) p.rng_state = pointer_or_null<int64_t>(a.rng_state);
  }
  p.scale = static_cast<float>(a.scale ? *a.scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  p.causal = a.causal;
  p.deterministic = a.deterministic;
#ifdef FLASH_MODELS_CUDA
  if (a.q.is_cuda()) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(a.q.get_device(), &p.stream));
#endif
  return p;
}

std::vector<int64_t> lse_shape(const AttentionProblem& p) {
  return p.cu_seqlens_q != nullptr ? std::vector<int64_t>{p.heads, p.total_q}
                                   : std::vector<int64_t>{p.batch, p.heads, p.seqlen_q};
}

std::vector<int64_t> shape_vector(const Tensor& t) {
  std::vector<int64_t> shape(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) shape[i] = t.size(i);
  return shape;
}

// The CUDA kernels read 16 bytes at a time, and Hopper's copy engine knows no stride of 0. A view whose rows do not
// start on 16 bytes, or that repeats itself, is copied.
Tensor aligned(const Tensor& t) {
  if (!t.is_cuda() || t.numel() == 0) return t;
  bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    fits = fits && (t.size(i) == 1 || (t.stride(i) % 8 == 0 && t.stride(i) != 0));
  if (fits) return t;
  Tensor copy = empty_on(t, shape_vector(t), t.scalar_type());
  return torch::stable::copy_(copy, t);
}

// Packed tokens that no sequence owns are not visited by the kernels, so their outputs start as zeros.
Tensor result_like(const Tensor& t, bool packed) {
  return packed ? zeros_on(t, shape_vector(t), t.scalar_type()) : empty_on(t, shape_vector(t), t.scalar_type());
}

// `floats` of scratch memory and where they begin; nothing if there are none.
OptionalTensor scratch_on(const Tensor& like, int64_t floats, float*& begin) {
  if (floats == 0) return {};
  Tensor scratch = empty_on(like, {floats}, ScalarType::Float);
  begin = static_cast<float*>(scratch.mutable_data_ptr());
  return scratch;
}

using Forward = void (*)(const AttentionProblem&);
using Backward = void (*)(const AttentionProblem&, const AttentionGradients&);
using ForwardScratch = int64_t (*)(const AttentionProblem&);
using Scratch = BackwardScratch (*)(const AttentionProblem&);

template <Forward kForward, ForwardScratch kScratch>
std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, std::optional<double> scale, bool causal,
                                         bool deterministic, OptionalTensor kv_range, double dropout_p,
                                         OptionalTensor rng_state, OptionalTensor cu_seqlens_q,
                                         OptionalTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                         OptionalTensor row_start, OptionalTensor row_index, OptionalTensor col_start,
                                         OptionalTensor col_index, OptionalTensor row_items, OptionalTensor col_items,
                                         int64_t block_size) {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (q.is_cuda()) guard.emplace(q.get_device_index());
  q = aligned(q), k = aligned(k), v = aligned(v);
  AttentionProblem p = make_problem({q,
                                     k,
                                     v,
                                     scale,
                                     causal,
                                     deterministic,
                                     kv_range,
                                     dropout_p,
                                     rng_state,
                                     cu_seqlens_q,
                                     cu_seqlens_k,
                                     max_seqlen_q,
                                     max_seqlen_k,
                                     row_start,
                                     row_index,
                                     col_start,
                                     col_index,
                                     row_items,
                                     col_items,
                                     block_size});
  const bool packed = p.cu_seqlens_q != nullptr;
  Tensor out = result_like(q, packed);
  Tensor lse = packed ? zeros_on(q, lse_shape(p), ScalarType::Float) : empty_on(q, lse_shape(p), ScalarType::Float);
  p.out = view_of(out, "out", packed);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  const OptionalTensor partial = scratch_on(q, kScratch(p), p.partial);
  OptionalTensor ticket;
  if (p.row_items.count > 0) {
    ticket = zeros_on(q, {1}, ScalarType::Int);
    p.ticket = static_cast<int32_t*>(ticket->mutable_data_ptr());
  }
  if (out.numel() > 0) kForward(p);
  return {out, lse};
}

template <Backward kBackward, Scratch kScratch>
std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor dout, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                                                 std::optional<double> scale, bool causal, bool deterministic,
                                                 OptionalTensor kv_range, double dropout_p, OptionalTensor rng_state,
                                                 OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                                 int64_t max_seqlen_q, int64_t max_seqlen_k, OptionalTensor row_start,
                                                 OptionalTensor row_index, OptionalTensor col_start,
                                                 OptionalTensor col_index, OptionalTensor row_items,
                                                 OptionalTensor col_items, int64_t block_size) {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (q.is_cuda()) guard.emplace(q.get_device_index());
  q = aligned(q), k = aligned(k), v = aligned(v), out = aligned(out), dout = aligned(dout);
  AttentionProblem p = make_problem({q,
                                     k,
                                     v,
                                     scale,
                                     causal,
                                     deterministic,
                                     kv_range,
                                     dropout_p,
                                     rng_state,
                                     cu_seqlens_q,
                                     cu_seqlens_k,
                                     max_seqlen_q,
                                     max_seqlen_k,
                                     row_start,
                                     row_index,
                                     col_start,
                                     col_index,
                                     row_items,
                                     col_items,
                                     block_size});
  const bool packed = p.cu_seqlens_q != nullptr;
  STD_TORCH_CHECK(shape_vector(dout) == shape_vector(q) && shape_vector(out) == shape_vector(q) &&
                      dout.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type(),
                  "flash_models: dout and out must have the shape and dtype of q");
  STD_TORCH_CHECK(shape_vector(lse) == lse_shape(p) && lse.is_contiguous() && lse.scalar_type() == ScalarType::Float,
                  "flash_models: lse does not fit q");
  p.out = view_of(out, "out", packed);
  p.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  Tensor dq = result_like(q, packed), dk = result_like(k, packed), dv = result_like(v, packed);
  const BackwardScratch scratch = kScratch(p);
  Tensor rows = empty_on(q, {2, scratch.rows}, ScalarType::Float);
  AttentionGradients g;
  g.dout = view_of(dout, "dout", packed);
  g.dq = view_of(dq, "dq", packed);
  g.dk = view_of(dk, "dk", packed);
  g.dv = view_of(dv, "dv", packed);
  g.delta = static_cast<float*>(rows.mutable_data_ptr());
  g.shift = g.delta + scratch.rows;
  OptionalTensor zeroed;
  if (scratch.dq_sum + scratch.tickets > 0) {
    zeroed = zeros_on(q, {scratch.dq_sum + scratch.tickets}, ScalarType::Float);
    float* begin = static_cast<float*>(zeroed->mutable_data_ptr());
    if (scratch.dq_sum > 0) g.dq_sum = begin;
    g.ticket = reinterpret_cast<int32_t*>(begin + scratch.dq_sum);
  }
  const OptionalTensor partial = scratch_on(q, scratch.partial, p.partial);
  if (q.numel() > 0 || k.numel() > 0) kBackward(p, g);
  return {dq, dk, dv};
}

}  // namespace

void parallel_for(int64_t n, int64_t grain, void (*fn)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { fn(context, begin, end); });
}

}  // namespace flash_models

STABLE_TORCH_LIBRARY_FRAGMENT(flash_models, m) {
  m.def("attention_fwd(" FM_SHARED_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("attention_bwd(Tensor dout, Tensor out, Tensor lse, " FM_SHARED_SCHEMA
        ") -> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(flash_models, CPU, m) {
  m.impl("attention_fwd",
         TORCH_BOX((&flash_models::attention_fwd<flash_models::attention_fwd_cpu, flash_models::forward_scratch_cpu>)));
  m.impl(
      "attention_bwd",
      TORCH_BOX((&flash_models::attention_bwd<flash_models::attention_bwd_cpu, flash_models::backward_scratch_cpu>)));
}

#ifdef FLASH_MODELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(flash_models, CUDA, m) {
  m.impl(
      "attention_fwd",
      TORCH_BOX((&flash_models::attention_fwd<flash_models::attention_fwd_cuda, flash_models::forward_scratch_cuda>)));
  m.impl(
      "attention_bwd",
      TORCH_BOX((&flash_models::attention_bwd<flash_models::attention_bwd_cuda, flash_models::backward_scratch_cuda>)));
}
#endif
