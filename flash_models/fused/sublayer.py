# SPDX-License-Identifier: Apache-2.0
"""A sublayer from a matrix product to the residual's sum and the norm, as one step of autograd.

Steps of autograd cost the host about as much as launches do. In one step the cast weights are not cast back: their
gradients leave the matrix products in the weights' dtype. Where the residual is the input, as in BERT's feed-forward,
its gradient is added within a matrix product.
"""

import torch

from .dispatch import CHUNK, add_product_, compute_dtype, multiply, weight_gradient
from .gelu import bias_gelu
from .kernels import gelu_backward, gelu_forward, norm_backward, norm_forward
from .norm import dropout_add_norm, dropout_seed, kept_and_normal_dtypes, kernels_take


def linear_dropout_add_norm(x, weight, bias, residual, norm, p, post_norm=False, transposed=False):
    """(residual + dropout(x W + bias), the nn.LayerNorm `norm` of it or None without one).

    x (..., M), residual (..., N); weight (N, M), or (M, N) with `transposed`; bias (N,) or None. With post_norm (see
    norm.py) None and the norm.
    """
    if not kernels_take(residual, norm):
        return dropout_add_norm(multiply(x, weight, transposed), bias, residual, norm, p, post_norm)
    return _run(x, None, None, weight, bias, residual, norm, p, post_norm, "none", transposed)


def feed_forward(
    x, weight_1, bias_1, approximate, weight_2, bias_2, residual, norm, p, post_norm=False, transposed=False
):  # fmt: skip
    """`linear_dropout_add_norm` of gelu(x W1 + bias_1), W2 and bias_2; approximate as F.gelu has it."""
    inner = weight_1.shape[1 if transposed else 0]
    if inner % CHUNK or not kernels_take(residual, norm):
        hidden = bias_gelu(multiply(x, weight_1, transposed), bias_1, approximate)
        return dropout_add_norm(multiply(hidden, weight_2, transposed), bias_2, residual, norm, p, post_norm)
    return _run(x, weight_1, bias_1, weight_2, bias_2, residual, norm, p, post_norm, approximate, transposed)


def _run(x, weight_1, bias_1, weight_2, bias_2, residual, norm, p, post_norm, approximate, transposed):
    scale, shift, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    dtypes = compute_dtype(x), *kept_and_normal_dtypes(compute_dtype(x), residual, post_norm)
    options = eps, p, approximate == "tanh", transposed, post_norm, *dtypes
    own = None if residual is x else residual
    return _Sublayer.apply(x, weight_1, bias_1, weight_2, bias_2, own, scale, shift, *options)


class _Sublayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight_1, bias_1, weight_2, bias_2, own, scale, shift, eps, p, tanh, transposed, post_norm, dtype,
        *dtypes,
    ):  # fmt: skip
        """own: the residual, None if it is x; dtype: of the matrix products; dtypes: of what the norm keeps for its
        backward and of the normalised."""
        residual = x if own is None else own
        first = None if weight_1 is None else weight_1.to(dtype)
        second = weight_2.to(dtype)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        before, hidden = None, flat
        if first is not None:
            before = flat @ (first if transposed else first.t())
            hidden = gelu_forward(before, bias_1, tanh)
        out = hidden @ (second if transposed else second.t())
        seed = dropout_seed(p, x)
        norm = scale, shift, eps, p, seed
        kept, normal, statistics = norm_forward(out, bias_2, residual, *norm, not post_norm, *dtypes)
        of_norm = None if scale is None else kept
        ctx.save_for_backward(flat, first, bias_1, before, hidden, second, of_norm, statistics, scale, seed)
        ctx.p, ctx.tanh, ctx.transposed, ctx.shape, ctx.has_bias = p, tanh, transposed, x.shape, bias_2 is not None
        ctx.weight_dtypes = None if weight_1 is None else weight_1.dtype, weight_2.dtype
        ctx.product_dtype, ctx.residual_dtype, ctx.shared = dtype, residual.dtype, own is None
        ctx.kept_sum = not post_norm
        ctx.set_materialize_grads(False)  # no zeros for what is not used
        return None if post_norm else kept, normal

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal, dnormal):
        if dtotal is None and dnormal is None:
            return (None,) * 16
        flat, first, bias_1, before, hidden, second, kept, statistics, scale, seed = ctx.saved_tensors
        needs_x, needs_1, _, needs_2, _, needs_own, *_ = ctx.needs_input_grad
        transposed = ctx.transposed
        dtypes = ctx.product_dtype, ctx.residual_dtype
        gradient, dresidual, dbias_2, dscale, dshift = norm_backward(
            dtotal, dnormal, kept, statistics, scale, seed, ctx.p, ctx.kept_sum, *dtypes, ctx.has_bias
        )
        gradient = gradient.view(-1, gradient.shape[-1])
        dweight_1 = dweight_2 = dbias_1 = dx = None
        if needs_2:
            dweight_2 = weight_gradient(hidden, gradient, transposed, ctx.weight_dtypes[1])
        last = second
        if first is not None:
            dhidden = gradient @ (second.t() if transposed else second)
            gradient, dbias_1 = gelu_backward(dhidden, before, bias_1, ctx.tanh)
            if needs_1:
                dweight_1 = weight_gradient(flat, gradient, transposed, ctx.weight_dtypes[0])
            last = first
        if needs_x:
            back = last.t() if transposed else last
            if not ctx.shared:
                dx = (gradient @ back).view(ctx.shape)
            elif dresidual is dtotal:
                dx = dresidual + (gradient @ back).view(ctx.shape)
            else:
                dx = dresidual
                add_product_(dx.view(-1, dx.shape[-1]), gradient, back)
        return (
            dx,
            dweight_1,
            dbias_1,
            dweight_2,
            dbias_2,
            dresidual if needs_own else None,
            dscale,
            dshift,
            *(None,) * 8,
        )
