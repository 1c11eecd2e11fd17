# SPDX-License-Identifier: Apache-2.0
"""Which form of a fused function runs, in which dtype it computes, and the matrix products of all of them."""

import torch
from torch.nn import functional as F

from .._library import no_kernel_reason

CHUNK = 8  # values that a thread of a kernel takes at once: 16 bytes of bfloat16


def use_kernels(tensor):
    """Whether the kernels, which compute in float32 and in chunks of columns, take `tensor` (..., N)."""
    known = tensor.is_cuda and tensor.dtype.itemsize <= 4 and tensor.shape[-1] % CHUNK == 0
    return known and no_kernel_reason(tensor.device) is None


def compute_dtype(tensor):
    """The dtype of a matrix product of `tensor`: autocast's inside of it, its own elsewhere."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def multiply(x, weight, transposed):
    """x (..., M) times the weight of an nn.Linear, (N, M), or with `transposed` of a Conv1D, (M, N)."""
    if not transposed:
        return F.linear(x, weight)
    return torch.mm(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def weight_gradient(x, gradient, transposed, dtype):
    """Of the weight of `multiply`, in `dtype`: x (T, M), the result's gradient (T, N)."""
    return product(x.t(), gradient, dtype) if transposed else product(gradient.t(), x, dtype)


def _widens(a, dtype):
    """Whether a matrix product of `a` can leave in `dtype`, a wider one, by itself."""
    return a.is_cuda and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16)


def product(a, b, dtype):
    """a @ b of two matrices, in `dtype`; a float32 one, of lower precision on CUDA, without a pass that casts."""
    return torch.mm(a, b, out_dtype=dtype) if _widens(a, dtype) else torch.mm(a, b).to(dtype)


def add_product_(total, a, b):
    """total += a @ b, all three matrices; within the product where that can be."""
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    if _widens(a, total.dtype) and not torch.compiler.is_compiling():
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(a @ b)
