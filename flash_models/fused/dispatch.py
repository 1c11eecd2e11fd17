# SPDX-License-Identifier: Apache-2.0
"""Which form of a fused function runs, and in which dtype it computes."""

import functools
import warnings

import torch


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


def product(a, b, dtype):
    """a @ b of two matrices, in `dtype`; a float32 one, of lower precision on CUDA, without a pass that casts."""
    direct = a.is_cuda and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16)
    if direct and not torch.compiler.is_compiling():
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)
