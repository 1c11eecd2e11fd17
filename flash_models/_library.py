# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled kernels, fills in for what they lack, and says what there is.

A backend that the library does not have (no library at all, or one built without CUDA) is served by `reference.py`,
under the same schemas and with one warning, so that no caller needs to know.
"""

import functools
import importlib.resources
import os
import re
import warnings
from pathlib import Path

import torch

from ._checks import check_qkv

_NAME = "_kernels.so"
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, float? scale, bool causal, bool deterministic, bool heads_first, "
    "Tensor? kv_range=None, float dropout_p=0., Tensor? rng_state=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, Tensor? row_start=None, "
    "Tensor? row_index=None, Tensor? col_start=None, Tensor? col_index=None, Tensor? row_items=None, "
    "Tensor? col_items=None, int block_size=0"
)
# The schemas of kernels/*/op.cpp, which a compiled library brings with it.
SCHEMAS = {
    "attention_fwd": f"({_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    "attention_bwd": f"(Tensor dout, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    "block_lists": (
        "(Tensor mask, int max_listed, bool transposed, int reach, int global_blocks) -> (Tensor start, Tensor index)"
    ),
    "random_blocks": "(Tensor like, int n, int reach, int global_blocks, int n_random, int seed) -> Tensor",
    "work_items": "(Tensor start, int max_blocks, int max_partial) -> Tensor",
    "norm_fwd": (
        "(Tensor? x, Tensor? bias, Tensor residual, Tensor? weight, Tensor? shift, float eps, float p, Tensor? seed, "
        "bool keep_sum, ScalarType kept_dtype, ScalarType dtype) -> (Tensor kept, Tensor out, Tensor statistics)"
    ),
    "norm_bwd": (
        "(Tensor? dsum, Tensor? dout, Tensor? kept, Tensor? statistics, Tensor? weight, Tensor? seed, float p, "
        "bool kept_sum, bool has_bias, bool needs_x, ScalarType x_dtype, bool needs_residual, "
        "ScalarType residual_dtype) -> (Tensor dx, Tensor dresidual, Tensor sums)"
    ),
    "gelu_fwd": "(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    "gelu_bwd": "(Tensor dout, Tensor x, Tensor? bias, bool tanh) -> (Tensor dx, Tensor dbias)",
    "softmax_gradient_": "(Tensor(a!) logits, Tensor labels, int vocabulary) -> Tensor",
}
fragment = torch.library.Library("flash_models", "FRAGMENT")


def _load():
    """(path of the library or None, why it is not in use or None)."""
    path = importlib.resources.files(__package__) / _NAME
    if not path.is_file():
        return None, f"{_NAME} is not in the installed package: it was installed without a C++ compiler, or not built"
    try:
        torch.ops.load_library(os.fspath(path))
    except OSError as error:
        return None, f"{path} does not load with torch {torch.__version__}: {' '.join(str(error).split())}"
    return os.fspath(path), None


def has_kernel(backend):
    return torch._C._dispatch_has_kernel_for_dispatch_key("flash_models::attention_fwd", backend)


@functools.cache
def _warn_once(reason):
    warnings.warn(
        f"flash_models runs its plain PyTorch reference, which is slow and keeps the S x S score matrix: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _serve_by_reference(backend, reason):
    def forward(*args):  # in schema order: the dispatcher knows no names
        from .reference import reference_forward  # which needs the layouts, and they this module

        _warn_once(reason)
        packed = any(cu_seqlens_q is not None for cu_seqlens_q in args[10:11])
        check_qkv(*args[:3], packed=packed, heads_first=args[6])
        with torch.autocast(args[0].device.type, enabled=False):  # the dtypes of the arguments rule, as in a kernel
            return reference_forward(*args)

    def backward(*args):
        from .reference import reference_backward

        with torch.autocast(args[0].device.type, enabled=False):
            return reference_backward(*args)

    fragment.impl("attention_fwd", forward, backend)
    fragment.impl("attention_bwd", backward, backend)


def _missing(backend):
    """Why `backend` ("CPU" or "CUDA") has no kernel; None where it has."""
    if _load_error is not None:
        return _load_error
    if not has_kernel(backend):
        return f"{library_path} was built without {backend} kernels" + (" (no nvcc)" if backend == "CUDA" else "")
    return None


library_path, _load_error = _load()
if library_path is None:
    for _op, _schema in SCHEMAS.items():
        fragment.define(_op + _schema)
_reasons = {backend: _missing(backend) for backend in ("CPU", "CUDA")}
for _backend, _reason in _reasons.items():
    if _reason is not None:
        _serve_by_reference(_backend, _reason)


@torch.compiler.assume_constant_result  # torch.compile asks while tracing, and warns of a cache that it would trace
def no_kernel_reason(device):
    """Why no kernel takes tensors on `device` (torch.device); None if one does."""
    return _no_kernel_reason(device)


@functools.cache
def _no_kernel_reason(device):
    if device.type not in ("cpu", "cuda"):
        return f"flash_models has kernels for CPU and CUDA, not for {device.type}"
    reason = _reasons[device.type.upper()]
    if reason is None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere (compute capability 8.0)"
    return reason


def _cuda_architectures():
    """Architectures that the library holds machine code for, such as ["sm_80", "sm_90a"]: nvcc notes them beside it."""
    options = re.findall(rb"-arch (sm_\w+)", Path(library_path).read_bytes()) if library_path else []
    return sorted({name.decode() for name in options})


class Info(dict):
    """A dict that prints as a table."""

    def __repr__(self):
        return "\n".join(f"{key:<13}{value}" for key, value in self.items())


def info():
    """What is installed and which kernel a call takes: a dict of str that prints as a table.

    Keys: `flash_models` (version), `library` (path, or why there is none), `backends`, `torch`, `gpu`, and what takes
    tensors on `cpu` and on `cuda`.
    """
    from . import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    architectures = _cuda_architectures()
    built = {"CPU": "CPU", "CUDA": f"CUDA ({', '.join(architectures)}, PTX)"}
    return Info(
        flash_models=__version__,
        library=library_path or f"none, pure Python ({_load_error})",
        backends=", ".join(built[backend] for backend, reason in _reasons.items() if reason is None) or "none",
        torch=torch.__version__,
        gpu=gpu or "none visible to torch",
        cpu=_kernel_on(torch.device("cpu"), architectures),
        cuda=_kernel_on(torch.device("cuda", torch.cuda.current_device()), architectures)
        if gpu
        else "not used: no GPU",
    )


def _kernel_on(device, architectures):
    reason = no_kernel_reason(device)
    if reason is not None:
        served = _reasons[device.type.upper()] is not None
        return f"{'plain PyTorch reference' if served else 'nothing'} ({reason})"
    if device.type == "cpu":
        return f"C++ kernels on a processor with {torch.backends.cpu.get_cpu_capability()}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (9, 0) and "sm_90a" in architectures:  # kernels/attention/cuda.cu
        return (
            "Hopper kernels (wgmma, sm_90a), because the compute capability is 9.0; portable ones for the backward of "
            "head dims 72 to 96, of head dims over 64 with blocks of 64, and for a deterministic dq"
        )
    code = f"compiled for sm_{major}0" if f"sm_{major}0" in architectures else "compiled from PTX"
    return f"portable kernels (mma.sync) {code}, because the compute capability is {major}.{minor}"
