# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values by one matrix product, read by their strides."""

import torch

from .dispatch import compute_dtype, product, weight_gradient


def project_qkv(x, weights, biases, head_dim, transposed=False):
    """q, k, v, each (B, H, S, D): x (B, S, M) times the weights plus the biases, D = head_dim.

    weights, biases: of one nn.Linear each, (N, M) and (N,); or with `transposed` one tensor for all three, as GPT-2's
    Conv1D has it: (M, 3 N) and (3 N,). q, k and v are views of one result. The backward copies their gradients into one
    tensor, which costs less memory traffic than three products that each read x and add to dx, and a quarter of the
    launches.
    """
    return _ProjectQKV.apply(x, head_dim, transposed, compute_dtype(x), *weights, *biases)


def _packed(weights, biases, dtype):
    """(3 N, M) and (3 N,) in `dtype`."""
    if torch.compiler.is_compiling():
        return tuple(torch.cat([t.to(dtype) for t in tensors]) for tensors in (weights, biases))
    packed = [t[0].new_empty((len(t) * len(t[0]), *t[0].shape[1:]), dtype=dtype) for t in (weights, biases)]
    places = [part for whole in packed for part in whole.chunk(len(weights))]
    torch._foreach_copy_(places, [*weights, *biases])  # casts and concatenates in one launch
    return packed


class _ProjectQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, head_dim, transposed, dtype, *parameters):
        half = len(parameters) // 2
        if transposed:
            weight, bias = parameters[0].to(dtype).t(), parameters[1].to(dtype)
        else:
            weight, bias = _packed(parameters[:half], parameters[half:], dtype)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        qkv = torch.addmm(bias, flat, weight.t())
        ctx.save_for_backward(flat, weight)
        ctx.transposed, ctx.shape, ctx.dtype, ctx.parameter_dtype = transposed, x.shape, x.dtype, parameters[0].dtype
        return qkv.view(*x.shape[:-1], 3, len(weight) // (3 * head_dim), head_dim).permute(2, 0, 3, 1, 4).unbind()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        x, weight = ctx.saved_tensors
        needs, dtype = ctx.needs_input_grad[4:], ctx.parameter_dtype
        half = len(needs) // 2
        gradient = torch.cat([g.transpose(1, 2) for g in gradients], 2).view(len(x), len(weight))
        dx = product(gradient, weight, ctx.dtype).view(ctx.shape) if ctx.needs_input_grad[0] else None
        dweight = dbias = (None,) * half
        if any(needs[:half]):
            dweight = weight_gradient(x, gradient, ctx.transposed, dtype).chunk(half)
        if any(needs[half:]):
            dbias = gradient.sum(0, dtype=dtype).chunk(half)
        found = [g if need else None for g, need in zip((*dweight, *dbias), needs, strict=True)]
        return dx, None, None, None, *found
