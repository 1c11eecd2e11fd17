# SPDX-License-Identifier: Apache-2.0
"""How the tests of flash_models.fused judge results; the forms of its functions are a fixture, `form`."""

import torch
from numerics import assert_as_accurate_as
from torch import nn


def check(function, reference, form, *shapes, dtypes=()):
    """Outputs and gradients of `function` of normal random inputs, against `reference` of the same."""
    device, dtype = form
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


def norm_of(weight, bias):
    module = nn.LayerNorm(weight.shape, eps=1e-5)
    del module.weight, module.bias
    module.weight, module.bias = weight, bias
    return module
