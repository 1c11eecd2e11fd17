# SPDX-License-Identifier: Apache-2.0
"""The forms of a function of flash_models.fused, and how its results and gradients are checked."""

import importlib.util
import os

import pytest
import torch
from numerics import assert_as_accurate_as

from flash_models.fused import cross_entropy, gelu, norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
FORMS = ["plain", "kernel", "graph"]


@pytest.fixture(params=FORMS)
def target(request, device, monkeypatch):
    """device, dtype, of a form."""
    if request.param != "plain" and device.type == "cpu" and not INTERPRETED:
        pytest.skip("the kernels need CUDA, or Triton and TRITON_INTERPRET=1")
    for module in (gelu, norm, cross_entropy):
        monkeypatch.setattr(module, "use_triton", lambda tensor: request.param != "plain")
    if request.param == "graph":  # the ops that a graph calls, without one
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


def check(function, reference, target, *shapes, dtypes=()):
    """Outputs and gradients of `function` of normal random inputs, against `reference` of the same."""
    device, dtype = target
    wide = torch.float64
    dtypes = dtypes or (dtype,) * len(shapes)
    inputs = [torch.randn(shape, device=device).to(kind) for shape, kind in zip(shapes, dtypes, strict=True)]
    found = []
    for call, kind in ((function, None), (reference, None), (reference, wide)):
        mine = [t.detach().to(kind or t.dtype).requires_grad_() for t in inputs]
        out = call(*mine)
        outs = list(out) if isinstance(out, tuple) else [out]
        torch.manual_seed(1)
        gradients = [torch.randn(o.shape, device=device).to(o.dtype) for o in outs]
        found.append([*outs, *torch.autograd.grad(outs, mine, gradients, materialize_grads=True)])
    for number, (actual, plain, truth) in enumerate(zip(*found, strict=True)):
        assert_as_accurate_as(actual, plain, truth, name=f"result {number}", noise=2e-5)
