# SPDX-License-Identifier: Apache-2.0
"""The fused functions inside of torch.compile on CUDA: their Triton kernels as ops that a graph calls.

What Inductor makes of their plain forms draws four numbers of Philox for every element and uses one, and adds up the
gradients of bias, weight and shift in passes of their own. Everything around stays Inductor's. The formulas of the
gradients, and that a missing tensor is an empty one, are here; the kernels are in norm_kernels.py and gelu_kernels.py.
"""

import torch
from torch import Tensor

from .norm import named_sums


def _given(tensor, like):
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op("flash_models::bias_gelu", mutates_args=())
def bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    from .gelu_kernels import gelu_forward

    return gelu_forward(x.contiguous(), bias, tanh)


@bias_gelu.register_fake
def _(x, bias, tanh):
    return x.new_empty(x.shape)


@torch.library.custom_op("flash_models::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    from .gelu_kernels import gelu_backward

    dx, dbias = gelu_backward(dout.contiguous(), x.contiguous(), bias, tanh)
    return dx, _given(dbias, x)


@_bias_gelu_backward.register_fake
def _(dout, x, bias, tanh):
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else x.new_empty(bias.shape, dtype=torch.float32)


def _save_gelu(ctx, inputs, output):
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _gelu_gradients(ctx, dout):
    x, bias = ctx.saved_tensors
    dx, dbias = _bias_gelu_backward(dout, x, bias, ctx.tanh)
    return dx, None if bias is None else dbias, None


bias_gelu.register_autograd(_gelu_gradients, setup_context=_save_gelu)


@torch.library.custom_op("flash_models::dropout_add_norm", mutates_args=())
def _dropout_add_norm(
    x: Tensor | None, bias: Tensor | None, residual: Tensor, weight: Tensor | None, shift: Tensor | None,
    seed: Tensor | None, eps: float, p: float, keep_sum: bool, kept_dtype: torch.dtype, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .norm_kernels import norm_forward

    kept, *rest = norm_forward(x, bias, residual, weight, shift, eps, p, seed, keep_sum, kept_dtype, dtype)
    return tuple(_given(tensor, residual) for tensor in (None if x is None else kept, *rest))


@_dropout_add_norm.register_fake
def _(x, bias, residual, weight, shift, seed, eps, p, keep_sum, kept_dtype, dtype):
    none, shape = residual.new_empty(0), residual.shape
    kept = none if x is None else residual.new_empty(shape, dtype=kept_dtype)
    if weight is None:
        return kept, none.clone(), none.clone()
    rows = residual.numel() // shape[-1]
    return kept, residual.new_empty(shape, dtype=dtype), residual.new_empty(2, rows, dtype=torch.float32)


@torch.library.custom_op("flash_models::dropout_add_norm_backward", mutates_args=())
def _dropout_add_norm_backward(
    dtotal: Tensor | None, dout: Tensor | None, kept: Tensor | None, statistics: Tensor | None, weight: Tensor | None,
    seed: Tensor | None, p: float, kept_sum: bool, x_dtype: torch.dtype | None, residual_dtype: torch.dtype,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .norm_kernels import norm_backward

    dx, dresidual, sums = norm_backward(
        dtotal, dout, kept, statistics, weight, seed, p, kept_sum, x_dtype, residual_dtype, has_bias
    )
    dresidual = None if dresidual is dtotal else dresidual  # an op does not return what it was given
    return _given(dx, sums), _given(dresidual, sums), sums


@_dropout_add_norm_backward.register_fake
def _(dtotal, dout, kept, statistics, weight, seed, p, kept_sum, x_dtype, residual_dtype, has_bias):
    like = dout if dout is not None else dtotal

    def made(wanted, shape, dtype):
        return like.new_empty(shape if wanted else 0, dtype=dtype if wanted else torch.float32)

    passed = dout is None and dtotal.dtype == residual_dtype
    sums = like.new_empty(has_bias + 2 * (dout is not None), like.shape[-1], dtype=torch.float32)
    return made(x_dtype is not None, like.shape, x_dtype), made(not passed, like.shape, residual_dtype), sums


def _save_norm(ctx, inputs, output):
    x, bias, residual, weight, _, seed, _, ctx.p, keep_sum, _, _ = inputs
    kept, _, statistics = output
    ctx.set_materialize_grads(False)
    ctx.kept_sum, ctx.has_bias = x is None or keep_sum, bias is not None
    ctx.dtypes = None if x is None else x.dtype, residual.dtype
    of_norm = (None, None) if weight is None else (residual if x is None else kept, statistics)
    ctx.save_for_backward(*of_norm, weight, seed)


def _norm_gradients(ctx, dkept, dout, _):
    kept, statistics, weight, seed = ctx.saved_tensors
    dtotal = dkept if ctx.kept_sum else None
    dout = dout if weight is not None else None
    if dtotal is None and dout is None:
        return (None,) * 11
    dx, dresidual, sums = _dropout_add_norm_backward(
        dtotal, dout, kept, statistics, weight, seed, ctx.p, ctx.kept_sum, *ctx.dtypes, ctx.has_bias
    )
    x_dtype, residual_dtype = ctx.dtypes
    if dout is None and dtotal.dtype == residual_dtype:
        dresidual = dtotal
    dbias, dweight, dshift = named_sums(sums, ctx.has_bias)
    return None if x_dtype is None else dx, dbias, dresidual, dweight, dshift, *(None,) * 6


_dropout_add_norm.register_autograd(_norm_gradients, setup_context=_save_norm)


def dropout_add_norm(x, bias, residual, weight, shift, eps, p, post_norm, seed, *dtypes):
    """As `norm.dropout_add_norm`, of what that has prepared."""
    kept, out, _ = _dropout_add_norm(x, bias, residual, weight, shift, seed, eps, p, not post_norm, *dtypes)
    total = None if post_norm else residual if x is None else kept
    return total, None if weight is None else out
