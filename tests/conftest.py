# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures. Every test that takes `device` runs on CPU and, where there is a GPU, unchanged on CUDA."""

import sys
from pathlib import Path

import compatibility
import emulated
import pytest
import torch
from attention_case import DTYPES

from flash_models.fused import cross_entropy, dispatch, gelu, kernels, norm

# the scripts and what they import: `import pathx`, `from tasks import ...`
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TARGETS = [(torch.device(device), dtype) for device in DEVICES for dtype in DTYPES[device]]

# The tensors are small: more threads wait for each other longer than they compute.
torch.set_num_threads(min(4, torch.get_num_threads()))


def pytest_addoption(parser):
    parser.addoption("--write-matrix", action="store_true", help="make the README's table from test_matrix.py")


def pytest_sessionfinish(session):
    if session.config.getoption("--write-matrix"):
        compatibility.write(session.config)


@pytest.fixture
def strict(monkeypatch):
    """Anything that does not reach the kernels is an error, also values of tensors on CUDA that only this looks at."""
    monkeypatch.setenv("FLASH_MODELS_STRICT", "1")


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=TARGETS, ids=lambda target: f"{target[0].type}-{DTYPE_NAMES[target[1]]}")
def target(request):
    """Where and in which dtype: {"device": ..., "dtype": ...}."""
    return dict(zip(("device", "dtype"), request.param, strict=True))


@pytest.fixture(params=DEVICES)
def one_dtype(request):
    """One dtype for each device, for what does not depend on it."""
    dtype = torch.bfloat16 if request.param == "cuda" else torch.float32
    return {"device": torch.device(request.param), "dtype": dtype}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory from torch's allocators, also for tensors made in C++, holds NaN until it is written.

    torch does this only in its deterministic mode, which would also choose the deterministic backward kernels: the
    function by which `attention` sees the mode is replaced.
    """
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert torch.empty(8).isnan().all()
    yield
    torch._C._set_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def emulated_sublayer(tmp_path_factory):
    """The ops of kernels/sublayer for CPU tensors."""
    if not emulated.POSSIBLE:
        pytest.skip(emulated.NEEDS)
    sources = [f"sublayer/{name}" for name in ("norm.cu", "gelu.cu", "cross_entropy.cu", "op.cpp")]
    ops = emulated.ops(tmp_path_factory.mktemp("emulated"), "emulated_sublayer", 90, sources)
    kernels.register_fakes("emulated_sublayer")
    return ops


@pytest.fixture(params=["plain", "kernel"])
def form(request, device, monkeypatch):
    """(device, dtype) of the fused functions in plain PyTorch, and by the kernels, which are emulated on a CPU."""
    kernel = request.param == "kernel"
    if kernel and device.type == "cpu":
        monkeypatch.setattr(kernels, "ops", request.getfixturevalue("emulated_sublayer"))
    for module in (gelu, norm, cross_entropy):
        monkeypatch.setattr(module, "use_kernels", lambda tensor: kernel and tensor.shape[-1] % dispatch.CHUNK == 0)
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16
