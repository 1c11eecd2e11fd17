# SPDX-License-Identifier: Apache-2.0
"""What ends a sublayer: bias, dropout, the residual's sum and LayerNorm (arXiv 1607.06450), in one pass.

Statistics and sums are float32 whatever the dtypes. A normalised result that only a matrix product reads has the dtype
of that, which under autocast is the lower one: transformers writes float32 there and casts. With `post_norm` it is the
next residual too, as in BERT, and has the dtype of the sum: rounded once a sublayer, the errors of gradients would add
up to more than twice those of transformers in twelve layers. Nobody reads the sum then; the backward gets it
normalised, at most the root of N, in float16, which is as short as bfloat16 and rounds to an eighth.
"""

import torch
from torch.nn import functional as F

from .dispatch import compute_dtype, use_kernels
from .kernels import MAX_COLUMNS, norm_backward, norm_forward


def layer_norm(x, norm, post_norm=False):
    """The nn.LayerNorm `norm` of x (..., N)."""
    return _run(None, None, x, norm, 0.0, post_norm)[1]


def norm_and_residual(x, norm):
    """(the nn.LayerNorm `norm` of x (..., N), x): the backward adds the gradients of both in its one pass, where that
    of an x used twice takes another."""
    total, normal = _run(None, None, x, norm, 0.0, False)
    return normal, total


def dropout_add_norm(x, bias, residual, norm, p, post_norm=False):
    """(residual + dropout(x + bias) in the dtype of residual and x together, or None with post_norm; the nn.LayerNorm
    `norm` of it or None without one); x, residual (..., N), bias (N,) or None."""
    return _run(x, bias, residual, norm, p, post_norm)


def _plain(x, bias, residual, norm, p, post_norm):
    total = residual
    if x is not None:
        total = F.dropout(x if bias is None else x + bias, p) + residual
        total = total.to(torch.promote_types(x.dtype, residual.dtype))
    if norm is None:
        return total, None
    normal = F.layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return (None, normal.to(total.dtype)) if post_norm else (total, normal.to(compute_dtype(total)))


def kernels_take(residual, norm):
    """Whether the kernels do."""
    affine = norm is None or norm.weight is not None and norm.bias is not None
    return affine and residual.shape[-1] <= MAX_COLUMNS and use_kernels(residual)


def _run(x, bias, residual, norm, p, post_norm):
    if not kernels_take(residual, norm):
        return _plain(x, bias, residual, norm, p, post_norm)
    weight, shift, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    dtypes = kept_and_normal_dtypes(residual.dtype if x is None else x.dtype, residual, post_norm)
    return _DropoutAddNorm.apply(x, bias, residual, weight, shift, eps, p, post_norm, *dtypes)


def kept_and_normal_dtypes(dtype, residual, post_norm):
    """Of what the backward reads of the sum of something in `dtype` and the residual, and of the normalised sum."""
    precise = torch.promote_types(dtype, residual.dtype)
    if not post_norm:
        return precise, compute_dtype(residual)
    return torch.float32 if dtype == torch.float32 else torch.float16, precise


def dropout_seed(p, like):
    """On the device, so that CUDA graphs and activation checkpointing draw what they should; None for p = 0."""
    return torch.randint(2**62, (1,), device=like.device) if p > 0 else None


class _DropoutAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, weight, shift, eps, p, post_norm, *dtypes):
        seed = dropout_seed(p, residual) if x is not None else None
        ctx.kept_sum = x is None or not post_norm
        kept, out, statistics = norm_forward(x, bias, residual, weight, shift, eps, p, seed, ctx.kept_sum, *dtypes)
        ctx.save_for_backward(kept if weight is not None else None, statistics, weight, seed)
        ctx.p, ctx.has_bias = p, bias is not None
        ctx.dtypes = None if x is None else x.dtype, residual.dtype
        ctx.set_materialize_grads(False)  # no zeros for what is not used
        return None if post_norm else kept, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal, dout):
        if dtotal is None and dout is None:
            return (None,) * 10
        kept, statistics, weight, seed = ctx.saved_tensors
        dx, dresidual, dbias, dweight, dshift = norm_backward(
            dtotal, dout, kept, statistics, weight, seed, ctx.p, ctx.kept_sum, *ctx.dtypes, ctx.has_bias
        )
        return dx, dbias, dresidual, dweight, dshift, *(None,) * 5
