# SPDX-License-Identifier: Apache-2.0
"""Which form of a fused function runs, in which dtype it computes, and the matrix products of all of them."""

import functools
import warnings

import torch
from torch.nn import functional as F


@functools.cache
def _has_triton():
    try:
        import triton  # noqa: F401
    except ImportError:
        warnings.warn(
            "fuse: triton is not installed, so plain PyTorch computes (the result is the same, but slower); "
            "it comes with PyTorch for CUDA, or: pip install triton",
            stacklevel=2,
        )
        return False
    return True


def use_triton(tensor):
    """Whether the Triton kernels, which compute in float32, take `tensor`: on CUDA, outside of torch.compile, which
    fuses plain PyTorch itself."""
    known = tensor.is_cuda and tensor.dtype.itemsize <= 4
    return known and not torch.compiler.is_compiling() and _has_triton()


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


def product(a, b, dtype):
    """a @ b of two matrices, in `dtype`; a float32 one, of lower precision on CUDA, without a pass that casts."""
    direct = a.is_cuda and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16)
    if direct and not torch.compiler.is_compiling():
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)
