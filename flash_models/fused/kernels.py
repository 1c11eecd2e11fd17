# SPDX-License-Identifier: Apache-2.0
"""The ops of kernels/sublayer, which each read and write an activation once, for CUDA tensors; shapes and dtypes of
their results, for torch.compile, which takes each as one step."""

import torch

ops = torch.ops.flash_models

MAX_COLUMNS = 8192  # of the norms: a row is held in registers


def norm_forward(x, bias, residual, weight, shift, eps, p, seed, keep_sum, kept_dtype, dtype):
    """(what is kept for the backward, in `kept_dtype`, normalised in `dtype`, float32 (2, rows) of means and 1 /
    standard deviations); the last two None without weight. Kept is the sum, or without `keep_sum`, which needs an x and
    a weight, the normalised sum before weight and shift."""
    residual = residual.contiguous()
    kept, out, statistics = ops.norm_fwd(
        x, bias, residual, weight, shift, eps, p, seed, keep_sum, kept_dtype, dtype
    )  # fmt: skip
    kept = residual if x is None else kept
    return (kept, None, None) if weight is None else (kept, out, statistics)


def norm_backward(dsum, dout, kept, statistics, weight, seed, p, kept_sum, x_dtype, residual_dtype, has_bias):
    """(dx or None, dresidual, gradients of bias, weight and shift): the last three float32 (columns,), None without a
    bias and without `dout`. dsum or dout may be None; dresidual is dsum itself where that is the gradient."""
    # without the norm the residual's gradient is that of the sum
    passed = dout is None and dsum.dtype == residual_dtype
    needs_x = x_dtype is not None
    dx, dresidual, sums = ops.norm_bwd(
        dsum, dout, kept, statistics, weight, seed, p, kept_sum, has_bias, needs_x, x_dtype or residual_dtype,
        not passed, residual_dtype,
    )  # fmt: skip
    sums = list(sums.unbind())
    dbias = sums.pop(0) if has_bias else None
    return dx if needs_x else None, dsum if passed else dresidual, dbias, *(sums or (None, None))


def gelu_forward(x, bias, tanh):
    """gelu(x + bias)."""
    return ops.gelu_fwd(x, bias, tanh)


def gelu_backward(dout, x, bias, tanh):
    """dx, and the gradient of the bias in float32, None without one."""
    dx, dbias = ops.gelu_bwd(dout, x, bias, tanh)
    return dx, None if bias is None else dbias


def softmax_gradient_(logits, labels, vocabulary):
    """See `cross_entropy._softmax_gradient_`; logits contiguous."""
    return ops.softmax_gradient_(logits, labels, vocabulary)


def _norm_fwd(x, bias, residual, weight, shift, eps, p, seed, keep_sum, kept_dtype, dtype):
    shape = residual.shape
    statistics = (2, residual.numel() // max(shape[-1], 1))
    return (
        residual.new_empty(0 if x is None else shape, dtype=kept_dtype),
        residual.new_empty(0 if weight is None else shape, dtype=dtype),
        residual.new_empty(0 if weight is None else statistics, dtype=torch.float32),
    )


def _norm_bwd(dsum, dout, kept, statistics, weight, seed, p, kept_sum, has_bias, needs_x, x_dtype, needs_residual,
              residual_dtype):  # fmt: skip
    like = dsum if dout is None else dout
    return (
        like.new_empty(like.shape if needs_x else 0, dtype=x_dtype),
        like.new_empty(like.shape if needs_residual else 0, dtype=residual_dtype),
        like.new_empty(has_bias + 2 * (dout is not None), like.shape[-1], dtype=torch.float32),
    )


def _gelu_fwd(x, bias, tanh):
    return x.new_empty(x.shape)


def _gelu_bwd(dout, x, bias, tanh):
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[-1], dtype=torch.float32)


def register_fakes(namespace):
    """What torch.compile knows of the results of the ops."""
    for name, fake in (
        ("norm_fwd", _norm_fwd), ("norm_bwd", _norm_bwd), ("gelu_fwd", _gelu_fwd), ("gelu_bwd", _gelu_bwd),
    ):  # fmt: skip
        torch.library.register_fake(f"{namespace}::{name}", fake)


register_fakes("flash_models")
