# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values by one matrix product, read by their strides."""

import torch

from .dispatch import compute_dtype


def project_qkv(x, weights, biases, transposed=False):
    """q, k, v, each (..., N): x (..., M) times the weights plus the biases.

    weights, biases: of one nn.Linear each, (N, M) and (N,); or with `transposed` one tensor for all three, as GPT-2's
    Conv1D has it: (M, 3 N) and (3 N,). q, k and v are views of one result. The backward adds the three parts of dx
    within the matrix products, so that no gradient is copied into one tensor or added by a pass of its own.
    """
    dtype = compute_dtype(x)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    parts = _ProjectQKV.apply(flat, transposed, dtype, *weights, *biases)
    return tuple(part.view(*x.shape[:-1], part.shape[-1]) for part in parts)


class _ProjectQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, transposed, dtype, *parameters):
        half = len(parameters) // 2
        weights, biases = parameters[:half], parameters[half:]
        with torch.autocast(x.device.type, enabled=False):
            weight = weights[0].to(dtype).t() if transposed else torch.cat([w.to(dtype) for w in weights])
            bias = biases[0].to(dtype) if transposed else torch.cat([b.to(dtype) for b in biases])
            qkv = torch.addmm(bias, x, weight.t())
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.dtypes = transposed, [p.dtype for p in parameters]
        return qkv.chunk(3, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        x, weight = ctx.saved_tensors
        needs, half = ctx.needs_input_grad[3:], len(ctx.dtypes) // 2
        size = weight.shape[0] // 3
        dx = None
        if ctx.needs_input_grad[0]:
            dx = gradients[0] @ weight[:size]
            for number in (1, 2):
                dx.addmm_(gradients[number], weight[number * size : (number + 1) * size])
        found = []
        if ctx.transposed:
            dweight = dbias = None
            if needs[0] and torch.compiler.is_compiling():  # which does not trace the other form
                dweight = torch.cat([x.t() @ gradient for gradient in gradients], 1)
            elif needs[0]:
                dweight = x.new_empty(x.shape[1], 3 * size)
                for gradient, part in zip(gradients, dweight.chunk(3, 1), strict=True):
                    torch.mm(x.t(), gradient, out=part)
            if needs[1]:
                dbias = torch.cat([gradient.sum(0) for gradient in gradients])
            found = [dweight, dbias]
        else:
            found += [g.t() @ x if need else None for g, need in zip(gradients, needs[:half], strict=True)]
            found += [g.sum(0) if need else None for g, need in zip(gradients, needs[half:], strict=True)]
        found = [None if g is None else g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)]
        return dx, None, None, *found
