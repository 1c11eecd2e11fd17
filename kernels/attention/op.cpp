// SPDX-License-Identifier: Apache-2.0
//
// Schema, registration and the checks that both backends rely on. They refuse whatever ops.py would of q, k and v,
// which it looks at only after a refusal, to report it in terms of its arguments.
#include "op.h"
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "numbers.h"

namespace flash_models {
namespace {

// The arguments that attention_fwd and attention_bwd share, taken from the dispatcher's stack in schema order.
struct Arguments {
  Stack stack;
  Tensor q = stack.take<Tensor>(), k = stack.take<Tensor>(), v = stack.take<Tensor>();
  std::optional<double> scale = stack.take<std::optional<double>>();
  bool causal = stack.take<bool>(), deterministic = stack.take<bool>(), heads_first = stack.take<bool>();
  OptionalTensor kv_range = stack.take<OptionalTensor>();
  double dropout_p = stack.take<double>();
  OptionalTensor rng_state = stack.take<OptionalTensor>(), cu_seqlens_q = stack.take<OptionalTensor>(),
                 cu_seqlens_k = stack.take<OptionalTensor>();
  int64_t max_seqlen_q = stack.take<int64_t>(), max_seqlen_k = stack.take<int64_t>();
  OptionalTensor row_start = stack.take<OptionalTensor>(), row_index = stack.take<OptionalTensor>(),
                 col_start = stack.take<OptionalTensor>(), col_index = stack.take<OptionalTensor>(),
                 row_items = stack.take<OptionalTensor>(), col_items = stack.take<OptionalTensor>();
  int64_t block_size = stack.take<int64_t>();

  bool packed() const { return cu_seqlens_q.has_value(); }
};

// Every argument that Python passes costs 0.1 us, so what few calls need comes last and has a default.
#define FM_SHARED_SCHEMA                                                                              \
  "Tensor q, Tensor k, Tensor v, float? scale, bool causal, bool deterministic, bool heads_first, "   \
  "Tensor? kv_range=None, float dropout_p=0., Tensor? rng_state=None, Tensor? cu_seqlens_q=None, "    \
  "Tensor? cu_seqlens_k=None, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, Tensor? row_start=None, " \
  "Tensor? row_index=None, Tensor? col_start=None, Tensor? col_index=None, Tensor? row_items=None, "  \
  "Tensor? col_items=None, int block_size=0"

// Which dimensions of a tensor are tokens and heads: (batch,) tokens, heads, head_dim, or the heads before the tokens.
struct Axes {
  int64_t rank, token, head;
};

Axes axes_of(bool packed, bool heads_first) {
  const int64_t rank = packed ? 3 : 4;
  return {rank, rank - 3 + heads_first, rank - 2 - heads_first};
}

View view_of(const Tensor& t, const char* name, const Axes& axes) {
  STD_TORCH_CHECK(t.dim() == axes.rank, "flash_models: ", name, " must have ", axes.rank, " dimensions, got shape ",
                  shape_of(t));
  STD_TORCH_CHECK(t.stride(axes.rank - 1) == 1 || t.size(axes.rank - 1) <= 1, "flash_models: the last dimension of ",
                  name, " must be contiguous");
  return {const_cast<void*>(t.const_data_ptr()), axes.rank == 3 ? 0 : t.stride(0), t.stride(axes.token),
          t.stride(axes.head)};
}

const int32_t* int32_or_null(const OptionalTensor& t, const char* name, const Tensor& q) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous() && same_device(*t, q),
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
  const bool packed = a.packed();
  const Axes axes = axes_of(packed, a.heads_first);
  AttentionProblem p;
  p.q = view_of(a.q, "q", axes);
  p.k = view_of(a.k, "k", axes);
  p.v = view_of(a.v, "v", axes);
  p.dtype = dtype_of(a.q, "q");
  STD_TORCH_CHECK(p.dtype != DType::kFloat32 || a.q.is_cpu(), "flash_models: float32 is for the CPU");
  STD_TORCH_CHECK(a.k.scalar_type() == a.q.scalar_type() && a.v.scalar_type() == a.q.scalar_type(),
                  "flash_models: q, k, v differ in dtype");
  STD_TORCH_CHECK(same_device(a.k, a.q) && same_device(a.v, a.q), "flash_models: q, k, v are on different devices");
  const int64_t last = axes.rank - 1;
  p.head_dim = a.q.size(last);
  p.heads = a.q.size(axes.head);
  STD_TORCH_CHECK(p.head_dim % 8 == 0 && p.head_dim >= 8 && p.head_dim <= 128,
                  "flash_models: head dim must be a multiple of 8 up to 128, got ", p.head_dim);
  for (const Tensor* t : {&a.k, &a.v})
    STD_TORCH_CHECK(t->size(last) == p.head_dim && t->size(axes.head) == p.heads &&
                        t->size(axes.token) == a.k.size(axes.token) && (packed || t->size(0) == a.q.size(0)),
                    "flash_models: q ", shape_of(a.q), " does not fit key or value ", shape_of(*t));
  p.seqlen_q = packed ? a.max_seqlen_q : a.q.size(axes.token);
  p.seqlen_k = packed ? a.max_seqlen_k : a.k.size(axes.token);
  p.batch = packed ? a.cu_seqlens_q->size(0) - 1 : a.q.size(0);
  p.total_q = packed ? a.q.size(axes.token) : p.batch * p.seqlen_q;
  p.total_k = packed ? a.k.size(axes.token) : p.batch * p.seqlen_k;
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
    const uint32_t byte = threshold >= 255.0 ? 255u : static_cast<uint32_t>(threshold);
    for (int bit = 0; bit < 8; ++bit) p.threshold_zeros[bit] = byte >> (7 - bit) & 1 ? 0u : ~0u;
    p.keep_scale = 256.0f / static_cast<float>(256u - byte);
    if (byte > 0) p.rng_state = pointer_or_null<int64_t>(a.rng_state);
  }
  p.scale = static_cast<float>(a.scale ? *a.scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  p.scale_log2 = std::max(p.scale * kLog2e, 1e-20f);
  p.causal = a.causal;
  p.deterministic = a.deterministic;
  p.stream = stream_of(a.q);
  return p;
}

Shape lse_shape(const AttentionProblem& p) {
  return p.cu_seqlens_q != nullptr ? Shape{p.heads, p.total_q} : Shape{p.batch, p.heads, p.seqlen_q};
}

Shape query_shape(const AttentionProblem& p) {
  return p.cu_seqlens_q != nullptr ? Shape{p.total_q, p.heads, p.head_dim}
                                   : Shape{p.batch, p.seqlen_q, p.heads, p.head_dim};
}

Shape key_shape(const AttentionProblem& p) {
  return p.cu_seqlens_q != nullptr ? Shape{p.total_k, p.heads, p.head_dim}
                                   : Shape{p.batch, p.seqlen_k, p.heads, p.head_dim};
}

// The CUDA kernels read 16 bytes at a time, and Hopper's copy engine knows no stride of 0. A view whose rows do not
// start on 16 bytes, or that repeats itself, is copied; one that is refused, for its last dimension, is not.
void align(Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (!t.is_cuda() || t.numel() == 0 || t.stride(last) != 1) return;
  bool fits = on_16_bytes(t);
  for (int64_t i = 0; i < last; ++i) fits = fits && (t.size(i) == 1 || (t.stride(i) % 8 == 0 && t.stride(i) != 0));
  if (fits) return;
  Tensor copy = empty_on(t, shape_vector(t), t.scalar_type());
  t = torch::stable::copy_(copy, t);
}

// A result of `shape` (B, S, H, D) or (T, H, D) in memory, so that what its reader reshapes it to is no copy; with
// heads_first its dimensions are then exchanged. Packed tokens that no sequence owns are not visited by the kernels, so
// they start as zeros.
Tensor result_on(const Tensor& like, const Shape& shape, ScalarType dtype, bool packed, bool heads_first = false) {
  const Tensor result = packed ? zeros_on(like, shape, dtype) : empty_on(like, shape, dtype);
  const Axes axes = axes_of(packed, heads_first);
  return heads_first ? exchanged(result, axes.token, axes.head) : result;
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
using ScratchOfForward = ForwardScratch (*)(const AttentionProblem&);
using ScratchOfBackward = BackwardScratch (*)(const AttentionProblem&);

template <Forward kForward, ScratchOfForward kScratch>
void attention_fwd(StableIValue* values, uint64_t, uint64_t) {
  Arguments a{values};
  const auto guard = on_device_of(a.q);
  for (Tensor* t : {&a.q, &a.k, &a.v}) align(*t);
  AttentionProblem p = make_problem(a);
  const Tensor out = result_on(a.q, query_shape(p), a.q.scalar_type(), a.packed());
  const Tensor lse = result_on(a.q, lse_shape(p), ScalarType::Float, a.packed());
  p.out = view_of(out, "out", axes_of(a.packed(), false));
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  const ForwardScratch scratch = kScratch(p);
  const OptionalTensor partial = scratch_on(a.q, scratch.partial, p.partial);
  float* zeros = nullptr;
  const OptionalTensor tickets = scratch_on(a.q, scratch.zeros, zeros);
  p.ticket = reinterpret_cast<int32_t*>(zeros);
  p.zeros = scratch.zeros;
  if (out.numel() > 0) kForward(p);
  give(values, out, lse);
}

template <Backward kBackward, ScratchOfBackward kScratch>
void attention_bwd(StableIValue* values, uint64_t, uint64_t) {
  Stack stack{values};
  Tensor dout = stack.take<Tensor>(), out = stack.take<Tensor>();
  const Tensor lse = stack.take<Tensor>();
  Arguments a{stack};
  const auto guard = on_device_of(a.q);
  for (Tensor* t : {&a.q, &a.k, &a.v, &out, &dout}) align(*t);
  AttentionProblem p = make_problem(a);
  const ScalarType dtype = a.q.scalar_type();
  STD_TORCH_CHECK(shape_vector(dout) == query_shape(p) && shape_vector(out) == query_shape(p) &&
                      dout.scalar_type() == dtype && out.scalar_type() == dtype,
                  "flash_models: dout and out must have the tokens, heads and dtype of q");
  STD_TORCH_CHECK(shape_vector(lse) == lse_shape(p) && lse.is_contiguous() && lse.scalar_type() == ScalarType::Float,
                  "flash_models: lse does not fit q");
  const Axes results = axes_of(a.packed(), false), inputs = axes_of(a.packed(), a.heads_first);
  p.out = view_of(out, "out", results);
  p.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  const Tensor dq = result_on(a.q, query_shape(p), dtype, a.packed(), a.heads_first),
               dk = result_on(a.q, key_shape(p), dtype, a.packed(), a.heads_first),
               dv = result_on(a.q, key_shape(p), dtype, a.packed(), a.heads_first);
  const BackwardScratch scratch = kScratch(p);
  const Tensor rows = empty_on(a.q, {2 * scratch.rows + 4 * scratch.starts}, ScalarType::Float);
  AttentionGradients g;
  g.dout = view_of(dout, "dout", results);
  g.dq = view_of(dq, "dq", inputs);
  g.dk = view_of(dk, "dk", inputs);
  g.dv = view_of(dv, "dv", inputs);
  float* row_values = static_cast<float*>(rows.mutable_data_ptr());
  if (scratch.starts > 0) g.starts = row_values;
  g.delta = row_values + 4 * scratch.starts;
  g.shift = g.delta + scratch.rows;
  float* begin = nullptr;
  const OptionalTensor sums = scratch_on(a.q, scratch.dq_sum + scratch.zeros, begin);
  if (scratch.dq_sum > 0) g.dq_sum = begin;
  if (scratch.zeros > 0) p.ticket = reinterpret_cast<int32_t*>(begin + scratch.dq_sum);
  p.zeros = scratch.zeros;
  const OptionalTensor partial = scratch_on(a.q, scratch.partial, p.partial);
  if (a.q.numel() > 0 || a.k.numel() > 0) kBackward(p, g);
  give(values, dq, dk, dv);
}

}  // namespace

int64_t thread_count() { return torch::stable::get_num_threads(); }

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
         flash_models::attention_fwd<flash_models::attention_fwd_cpu, flash_models::forward_scratch_cpu>);
  m.impl("attention_bwd",
         flash_models::attention_bwd<flash_models::attention_bwd_cpu, flash_models::backward_scratch_cpu>);
}

#ifdef FLASH_MODELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(flash_models, CUDA, m) {
  m.impl("attention_fwd",
         flash_models::attention_fwd<flash_models::attention_fwd_cuda, flash_models::forward_scratch_cuda>);
  m.impl("attention_bwd",
         flash_models::attention_bwd<flash_models::attention_bwd_cuda, flash_models::backward_scratch_cuda>);
}
#endif
