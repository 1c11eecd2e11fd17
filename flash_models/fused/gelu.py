# SPDX-License-Identifier: Apache-2.0
"""Bias and GELU (arXiv 1606.08415), exact or by tanh, in one pass; the bias's gradient in the pass of the backward."""

import torch
from torch.nn import functional as F

from .dispatch import use_kernels
from .kernels import gelu_backward, gelu_forward


def bias_gelu(x, bias, approximate="none"):
    """gelu(x + bias), in x's dtype; x (..., N), bias (N,) or None; approximate: "none" or "tanh", as F.gelu has it."""
    if use_kernels(x):
        return _BiasGelu.apply(x, bias, approximate == "tanh")
    return F.gelu(x if bias is None else (x + bias).to(x.dtype), approximate=approximate)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, tanh):
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        ctx.tanh = tanh
        return gelu_forward(x, bias, tanh)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, bias = ctx.saved_tensors
        return *gelu_backward(dout, x, bias, ctx.tanh), None
