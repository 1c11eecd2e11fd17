# SPDX-License-Identifier: Apache-2.0
"""What the kernels of kernels/sublayer take and promise; what they compute is in test_fused_functions.py."""

import pytest
import torch
from fused_case import check, norm_of
from torch import nn
from torch.nn import functional as F

from flash_models.fused import bias_gelu, dropout_add_norm, feed_forward, kernels, layer_norm, norm_and_residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(form, dtype):
    def layer(x, b, r, w, s):
        total, normal = dropout_add_norm(bias_gelu(x, b, "tanh"), None, r, norm_of(w, s), 0.0)
        return total, normal

    def reference(x, b, r, w, s):
        total = F.gelu(x + b, approximate="tanh") + r
        return total, F.layer_norm(total, (32,), w, s)

    check(layer, reference, (form[0], dtype), (5, 32), (32,), (5, 32), (32,), (32,))


def test_inputs_of_any_layout(form):
    """Transposed, and not on 16 bytes: kernels read copies of these."""
    device, dtype = form
    whole = torch.randn(65 * 64 + 1, device=device).to(dtype)
    odd = whole[1:].view(65, 64)
    for x in (odd[:64].t(), odd[:, :32], whole[1 : 1 + 64 * 64].view(64, 64)):
        found = [bias_gelu(x, None, "tanh"), layer_norm(x, nn.LayerNorm(x.shape[-1], device=device, dtype=dtype))]
        expected = [F.gelu(x, approximate="tanh"), F.layer_norm(x, x.shape[-1:])]
        torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0.02)


def test_no_rows(form):
    device, dtype = form
    x = torch.randn(0, 64, device=device, dtype=dtype, requires_grad=True)
    module = nn.LayerNorm(64, device=device, dtype=dtype)
    total, normal = dropout_add_norm(bias_gelu(x, module.bias), module.bias, x, module, 0.1)
    (total.sum() + normal.sum()).backward()
    assert x.grad.shape == (0, 64) and not module.weight.grad.any() and not module.bias.grad.any()


def test_sums_over_rows_are_in_a_fixed_order(form):
    device, dtype = form
    x, residual = (torch.randn(3000, 64, device=device).to(dtype) for _ in range(2))
    dout = torch.randn(3000, 64, device=device).to(dtype)
    module, bias = nn.LayerNorm(64, device=device, dtype=dtype), torch.randn(64, device=device, dtype=dtype)
    parameters = [bias.requires_grad_(), *module.parameters()]
    runs = []
    for _ in range(3):
        torch.manual_seed(3)
        normal = dropout_add_norm(bias_gelu(x, bias), bias, residual, module, 0.1)[1]
        runs.append(torch.autograd.grad(normal, parameters, dout))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_graph_has_the_same_results(form, post_norm):
    device, _ = form
    torch._dynamo.reset()
    first, second = nn.Linear(64, 96, device=device), nn.Linear(96, 64, device=device)
    module, x = nn.LayerNorm(64, device=device), torch.randn(2, 9, 64, device=device, requires_grad=True)
    parameters = [x, *(weight for part in (first, second, module) for weight in part.parameters())]

    def layer(x):
        normal, x = (x, x) if post_norm else norm_and_residual(x, module)
        options = first.weight, first.bias, "tanh", second.weight, second.bias
        total, out = feed_forward(normal, *options, x, module, 0.0, post_norm)
        return out if post_norm else dropout_add_norm(out, None, total, None, 0.0)[0]

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out = function(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), parameters)])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_kernels_refuse_what_they_cannot_read(form):
    device, dtype = form
    x, bias = torch.randn(3, 16, device=device), torch.randn(8, device=device)
    if kernels.ops is torch.ops.flash_models and device.type == "cpu":
        pytest.skip("the plain form does not get there")
    for arguments, message in (
        ((torch.randn(3, 12, device=device), None, True), r"a multiple of 8, got shape \(3, 12\)"),
        ((x, bias, True), r"bias must have 16 values .* got shape \(8\)"),
        ((x.double(), None, True), "x must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.ops.gelu_fwd(*arguments)
    with pytest.raises(RuntimeError, match="int64 seed on the device of the others"):
        seed = torch.zeros(1, device=device)
        kernels.ops.norm_fwd(x, None, x, None, None, 0.0, 0.1, seed, True, x.dtype, x.dtype)
