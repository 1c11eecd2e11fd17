# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a projection to the vocabulary that never holds all logits, nor any of them in float32.

Tokens without a label are not projected. The others are taken in chunks: a chunk's logits become, in place, their own
gradient, from which the gradients of the inputs follow at once (the idea of Liger-Kernel's fused linear cross-entropy,
arXiv 2410.10989). They are those of the summed loss: means, gradient scaling and accumulation are factors that the
backward applies. The vocabulary is padded to a multiple of 64, for rows of an odd length keep matrix products from the
fast path; padding columns get no probability.
"""

import torch

from .dispatch import compute_dtype, use_kernels
from .kernels import softmax_gradient_

MAX_LOGITS_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
ALIGNMENT = 64
WEIGHT_SCALE = 2.0**-10  # of the weight's gradient until the backward: its sum over tokens would overflow float16


def linear_cross_entropy(hidden, weight, bias, labels, ignore_index=-100, reduction="mean"):
    """F.cross_entropy(F.linear(hidden, weight, bias), labels): hidden (T, N), weight (V, N), bias (V,) or None, labels
    int64 (T,); a float32 scalar, the "mean" over labels that are not `ignore_index`, or their "sum".

    On CUDA it waits for the GPU once, to learn how many tokens have a label, and not while a CUDA graph is captured.
    """
    if torch.compiler.is_compiling() and torch.__version__ < "2.13":
        _introduce_to_inductor()
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    total, *_ = _loss_and_gradients(hidden, weight, bias, labels, ignore_index, compute_dtype(hidden), *needs)
    if reduction == "sum":
        return total
    count = (labels != ignore_index).sum()
    # without a label the mean is NaN, as F.cross_entropy has it, and the gradient 0
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def _chunks(rows, columns, like):
    """(first, last) of every chunk of rows, about equally long."""
    limit = MAX_LOGITS_BYTES.get(like.device.type, 1 << 27) // (columns * like.element_size())
    count = -(-rows // max(limit, 1))
    size = -(-rows // max(count, 1))
    size = min(-(-size // ALIGNMENT) * ALIGNMENT, max(limit, 1))  # a multiple of a matrix product's tiles
    return [(first, min(first + size, rows)) for first in range(0, rows, size)] if rows else []


def _padded(tensor, rows, dtype):
    """A copy in `dtype` with zeros behind, `rows` in all; the tensor itself where it is that already."""
    if tensor is None or tensor.shape[0] == rows:
        return None if tensor is None else tensor.to(dtype)
    copy = tensor.new_empty((rows, *tensor.shape[1:]), dtype=dtype)
    copy[: tensor.shape[0]].copy_(tensor)
    copy[tensor.shape[0] :].zero_()
    return copy


def _softmax_gradient_(logits, labels, vocabulary):
    """Turn logits (n, padded V) into the gradient of the summed loss; the losses, float32 (n,). Labels below 0 have
    neither."""
    if use_kernels(logits):
        return softmax_gradient_(logits, labels, vocabulary)
    real = logits[:, :vocabulary]
    log_p = real.to(torch.promote_types(real.dtype, torch.float32)).log_softmax(-1)
    valid, index = labels >= 0, labels.clamp(min=0)[:, None]
    losses = torch.where(valid, -log_p.gather(1, index)[:, 0], 0)
    real.copy_(log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0)).mul_(valid[:, None]))
    logits[:, vocabulary:].zero_()
    return losses


def _select(hidden, labels, ignore_index, vocabulary):
    """(places of the tokens with a label or None for all, hidden and labels there, -1 for a label that is ignored)."""
    valid = labels != ignore_index
    torch._assert_async(
        (~valid | (labels >= 0) & (labels < vocabulary)).all(),
        f"a label is neither ignore_index ({ignore_index}) nor in the vocabulary, 0 to {vocabulary - 1}",
    )
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        return None, hidden, torch.where(valid, labels, -1)
    places = valid.nonzero()[:, 0]
    if len(places) == len(labels):
        return None, hidden, labels
    return places, hidden.index_select(0, places), labels.index_select(0, places)


# An op of its own, so that torch.compile takes it as one: how many tokens have a label is known only when it runs.
@torch.library.custom_op(
    "flash_models::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, ScalarType dtype, "
    "bool needs_hidden, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _loss_and_gradients(hidden, weight, bias, labels, ignore_index, dtype, needs_hidden, needs_weight, needs_bias):
    """(summed loss, its gradients by hidden, weight (times WEIGHT_SCALE) and bias); empty where one is not needed."""
    vocabulary, size = weight.shape
    places, selected, labels = _select(hidden, labels, ignore_index, vocabulary)
    padded = -(-vocabulary // ALIGNMENT) * ALIGNMENT
    wide = torch.promote_types(dtype, torch.float32)
    total = hidden.new_zeros((), dtype=wide)
    dselected = hidden.new_empty(selected.shape if needs_hidden else 0)
    dbias = weight.new_zeros(vocabulary if needs_bias else 0, dtype=wide)
    dweight = None
    with torch.autocast(hidden.device.type, enabled=False):
        w, b = _padded(weight, padded, dtype), _padded(bias, padded, dtype)
        chunks = _chunks(len(labels), padded, w)
        for first, last in chunks:
            x = selected[first:last].to(dtype)
            logits = x @ w.t() if b is None else torch.addmm(b, x, w.t())
            total += _softmax_gradient_(logits, labels[first:last], vocabulary).sum()
            if needs_hidden:
                dselected[first:last] = logits @ w
            if needs_bias:
                dbias += logits[:, :vocabulary].sum(0, dtype=wide)
            if needs_weight:
                part = torch.addmm(w, logits.t(), x, beta=0, alpha=WEIGHT_SCALE)[:vocabulary]
                if dweight is None:
                    dweight = part if len(chunks) == 1 else part.to(wide)
                else:
                    dweight += part
    if needs_weight:
        dweight = torch.zeros_like(weight) if dweight is None else dweight.to(weight.dtype).contiguous()
    else:
        dweight = weight.new_empty(0)
    if needs_hidden and places is not None:
        dselected = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(0, places, dselected)
    return total, dselected, dweight, dbias


@_loss_and_gradients.register_fake
def _(hidden, weight, bias, labels, ignore_index, dtype, needs_hidden, needs_weight, needs_bias):
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=wide),
    )


def _setup_context(ctx, inputs, output):
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.needs, ctx.bias_dtype = inputs[6:], None if inputs[2] is None else inputs[2].dtype
    ctx.save_for_backward(*gradients)
    ctx.set_materialize_grads(False)


def _backward(ctx, dtotal, *_):
    dhidden, dweight, dbias = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs
    none = (None,) * 6
    if dtotal is None:
        return None, None, None, *none
    return (
        # in float32, because the factor alone may be too small for float16
        (dhidden * dtotal).to(dhidden.dtype) if needs_hidden else None,
        (dweight * (dtotal / WEIGHT_SCALE)).to(dweight.dtype) if needs_weight else None,
        (dbias * dtotal).to(ctx.bias_dtype) if needs_bias else None,
        *none,
    )


_loss_and_gradients.register_autograd(_backward, setup_context=_setup_context)


@torch.compiler.assume_constant_result  # runs while torch.compile traces
def _introduce_to_inductor():
    """The op last in a graph, as Inductor would register it when it meets it. Up to torch 2.12 that formats, for a log,
    the op's arguments with all that they were computed from: through norms and residuals there are 2^layers ways."""
    from torch._inductor import lowering
    from torch._library.utils import get_layout_constraint_tag

    op = _loss_and_gradients._opoverload
    if op not in lowering.lowerings:
        tag = get_layout_constraint_tag(op, with_default=True)
        lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag))
