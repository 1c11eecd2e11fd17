# SPDX-License-Identifier: Apache-2.0
"""The functions of flash_models.fused, plain and by the kernels, which are emulated without a GPU, against torch's."""

import pytest
import torch
from fused_case import check, norm_of
from torch import nn
from torch.nn import functional as F

from flash_models.fused import (
    bias_gelu,
    cross_entropy,
    dropout_add_norm,
    feed_forward,
    layer_norm,
    linear_cross_entropy,
    linear_dropout_add_norm,
    norm_and_residual,
    project_qkv,
)


@pytest.mark.parametrize("shape", [(3, 7, 96), (65, 1032), (1, 5)])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu(form, approximate, shape):
    def reference(x, b):
        return F.gelu(x + b, approximate=approximate)

    check(lambda x, b: bias_gelu(x, b, approximate), reference, form, shape, shape[-1:])
    check(lambda x: bias_gelu(x, None, approximate), lambda x: F.gelu(x, approximate=approximate), form, shape)


@pytest.mark.parametrize("shape", [(3, 7, 96), (33, 1000), (1, 16), (2, 2056), (3, 4104)])
def test_norms(form, shape):
    column = shape[-1:]

    def both(x, b, r, w, s):
        return x + b + r, F.layer_norm(x + b + r, column, w, s)

    check(lambda x, b, r, w, s: dropout_add_norm(x, b, r, norm_of(w, s), 0.0), both, form,
          shape, column, shape, column, column)  # fmt: skip
    check(lambda x, b, r, w, s: dropout_add_norm(x, b, r, norm_of(w, s), 0.0)[1], lambda *a: both(*a)[1], form,
          shape, column, shape, column, column)  # fmt: skip
    check(
        lambda x, b, r: dropout_add_norm(x, b, r, None, 0.0)[0], lambda x, b, r: x + b + r, form, shape, column, shape
    )
    check(lambda x, w, s: norm_and_residual(x, norm_of(w, s)), lambda x, w, s: (F.layer_norm(x, column, w, s), 1 * x),
          form, shape, column, column)  # fmt: skip
    check(lambda x, w, s: layer_norm(x, norm_of(w, s)), lambda x, w, s: F.layer_norm(x, column, w, s), form,
          shape, column, column)  # fmt: skip


def test_a_wide_residual_stays_wide(form):
    """As under autocast: the sum is float32, what a matrix product reads is not."""
    device, _ = form
    x, residual = torch.randn(5, 64, device=device).bfloat16(), torch.randn(5, 64, device=device)
    module = nn.LayerNorm(64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        total, normal = dropout_add_norm(x, None, residual, module, 0.0)
    assert total.dtype == torch.float32 and normal.dtype == torch.bfloat16
    assert torch.equal(total, x.float() + residual)
    torch.testing.assert_close(normal, module(total).bfloat16(), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("hidden", [None, 160])
def test_a_norm_that_goes_on_as_the_residual_is_as_precise(form, hidden):
    """Under autocast, with a float32 input, as in BERT: the result and the gradients of all are float32, with at
    most twice the error of transformers' way."""
    device, _ = form
    torch.manual_seed(0)
    module, last = nn.LayerNorm(64, device=device), nn.Linear(hidden or 64, 64, device=device)
    first = nn.Linear(64, hidden, device=device) if hidden else None
    parameters = [*module.parameters(), *last.parameters(), *(first.parameters() if hidden else ())]
    start, dout = torch.randn(2, 7, 9, 64, device=device).unbind()

    def fused(x):
        if hidden:
            options = first.weight, first.bias, "none", last.weight, last.bias
            return feed_forward(x, *options, x, module, 0.0, post_norm=True)
        return linear_dropout_add_norm(x, last.weight, last.bias, x, module, 0.0, post_norm=True)

    def plain(x):
        return None, module(last(F.gelu(first(x)) if hidden else x) + x)

    results = []
    for function, autocast in ((plain, False), (plain, True), (fused, True)):
        x = start.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            total, normal = function(x)
        assert total is None and normal.dtype == torch.float32
        results.append([normal.detach(), *torch.autograd.grad(normal, (x, *parameters), dout)])
    for exact, theirs, ours in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6 * exact.norm()


def test_dropout_drops_the_same_in_the_backward(form):
    device, dtype = form
    x = torch.ones(200, 96, device=device, dtype=dtype, requires_grad=True)
    residual = torch.zeros_like(x)
    torch.manual_seed(5)
    out = dropout_add_norm(x, None, residual, None, 0.3)[0]
    kept = out != 0
    assert 0.67 < kept.float().mean() < 0.73 and out.max().item() == pytest.approx(1 / 0.7, rel=0.01)
    rows = kept.float().mean(1)
    assert 0 < rows.var() < 4 * 0.21 / 96  # independent: no row is a copy of another
    assert not torch.equal(kept[0], kept[1])
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient != 0, kept)
    torch.manual_seed(5)
    assert torch.equal(dropout_add_norm(x, None, residual, None, 0.3)[0], out)
    assert not torch.equal(dropout_add_norm(x, None, residual, None, 0.3)[0], out)


@pytest.mark.parametrize("transposed", [False, True])
def test_project_qkv(device, transposed):
    form = device, torch.float32 if device.type == "cpu" else torch.bfloat16

    def reference(x, *parameters):
        if transposed:
            found = (x @ parameters[0] + parameters[1]).chunk(3, -1)
        else:
            found = [F.linear(x, *pair) for pair in zip(parameters[:3], parameters[3:], strict=True)]
        return tuple(part.view(2, 9, 4, 8).transpose(1, 2) for part in found)

    def ours(x, *parameters):
        half = len(parameters) // 2
        return project_qkv(x, parameters[:half], parameters[half:], 8, transposed)

    shapes = [(24, 96), (96,)] if transposed else [(32, 24)] * 3 + [(32,)] * 3
    check(ours, reference, form, (2, 9, 24), *shapes)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("hidden", [None, 160])
@pytest.mark.parametrize("shared", [False, True])
def test_sublayers(form, shared, hidden, transposed, normed):
    """x (2, 9, 64); its sum and the norm, or with `shared` only what the next layer of BERT reads."""
    post_norm = shared and normed

    def multiply(x, w):
        return x @ w if transposed else F.linear(x, w)

    def halves(x, *rest):
        residual = x if shared else rest[0]
        rest = rest if shared else rest[1:]
        return residual, rest[:-4], *rest[-4:]

    def select(total, normal):
        return normal if post_norm else (total, normal) if normed else total

    def reference(x, *rest):
        residual, first, w, b, scale, shift = halves(x, *rest)
        h = F.gelu(multiply(x, first[0]) + first[1], approximate="tanh") if first else x
        total = multiply(h, w) + b + residual
        return select(total, F.layer_norm(total, (64,), scale, shift))

    def ours(x, *rest):
        residual, first, w, b, scale, shift = halves(x, *rest)
        norm = norm_of(scale, shift) if normed else None
        if first:
            return select(*feed_forward(x, *first, "tanh", w, b, residual, norm, 0.0, post_norm, transposed))
        return select(*linear_dropout_add_norm(x, w, b, residual, norm, 0.0, post_norm, transposed))

    inner = hidden or 64
    first = [(64, inner) if transposed else (inner, 64), (inner,)] if hidden else []
    second = [(inner, 64) if transposed else (64, inner), (64,)]
    check(ours, reference, form, (2, 9, 64), *([] if shared else [(2, 9, 64)]), *first, *second, (64,), (64,))


def test_each_gradient_alone(form):
    """With everything else frozen it is what it is among the others."""
    device, dtype = form

    def attention_input(x, *parameters):
        return torch.cat(project_qkv(x, parameters[:3], parameters[3:], 8))

    def layer(x, w1, b1, w2, b2, scale, shift):
        return feed_forward(x, w1, b1, "none", w2, b2, x, norm_of(scale, shift), 0.0)[1]

    for function, shapes in (
        (attention_input, [(2, 5, 32), *[(32, 32)] * 3, *[(32,)] * 3]),
        (layer, [(2, 5, 32), (48, 32), (48,), (32, 48), (32,), (32,), (32,)]),
    ):
        inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
        together = torch.autograd.grad(function(*inputs).square().sum(), inputs)
        for number, expected in enumerate(together):
            alone = [t if number == index else t.detach() for index, t in enumerate(inputs)]
            (found,) = torch.autograd.grad(function(*alone).square().sum(), alone[number])
            torch.testing.assert_close(found, expected)


def test_a_captured_graph_projects_every_token(form, monkeypatch):
    """It cannot know how many have a label: the others, marked by -1, give no loss and no gradient."""
    device, _ = form
    labels = torch.tensor([3, -100, 0, -100, 5], device=device)
    everything = (None, torch.where(labels == -100, -1, labels))
    monkeypatch.setattr(cross_entropy, "_select", lambda x, *rest: (everything[0], x, everything[1]))
    check(
        lambda x, w: linear_cross_entropy(x, w, None, labels),
        lambda x, w: F.cross_entropy((x @ w.t()).to(torch.promote_types(x.dtype, torch.float32)), labels),
        form, (5, 24), (97, 24),
    )  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("limit", [1, 30_000, 1 << 30], ids=["rows of one", "chunks", "whole"])
def test_linear_cross_entropy(form, monkeypatch, limit, reduction, bias):
    device, dtype = form
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS_BYTES", {device.type: limit})
    rows, columns, vocabulary = (5, 24, 97) if limit == 1 else (150, 24, 97)
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    labels[::4] = -100

    def reference(x, w, b=None):
        return F.cross_entropy(F.linear(x, w, b).to(torch.promote_types(x.dtype, torch.float32)), labels,
                               reduction=reduction)  # fmt: skip

    def ours(x, w, b=None):
        return linear_cross_entropy(x, w, b, labels, reduction=reduction)

    check(ours, reference, form, (rows, columns), (vocabulary, columns), *([(vocabulary,)] if bias else []))


def test_linear_cross_entropy_in_float16_does_not_overflow(form):
    """The gradient of the vocabulary's weight is the sum over many tokens of one label; a scaled loss scales it."""
    device, _ = form
    x = (30 * torch.ones(5000, 16, device=device)).half()
    weight = torch.zeros(64, 16, device=device).half().requires_grad_()
    labels = torch.zeros(5000, dtype=torch.long, device=device)
    (linear_cross_entropy(x, weight, None, labels) * 64).backward()
    assert weight.grad[0, 0].item() == pytest.approx(-(63 / 64) * 30 * 64, rel=0.01)


def test_linear_cross_entropy_needs_only_what_is_asked_for(form):
    device, dtype = form
    x = torch.randn(9, 16, device=device, dtype=dtype, requires_grad=True)
    weight, labels = torch.randn(20, 16, device=device, dtype=dtype), torch.arange(9, device=device)
    linear_cross_entropy(x, weight, None, labels).backward()
    expected = x.detach().clone().requires_grad_()
    F.cross_entropy((expected @ weight.t()).float(), labels).backward()
    torch.testing.assert_close(x.grad, expected.grad, atol=1e-6 if dtype == torch.float32 else 5e-3, rtol=1e-2)
    assert weight.grad is None and not linear_cross_entropy(x.detach(), weight, None, labels).requires_grad


def test_a_label_beyond_the_vocabulary_is_an_error():
    x, weight = torch.randn(3, 8), torch.randn(11, 8)
    for label in (11, -1):
        with pytest.raises(RuntimeError, match=r"neither ignore_index \(-100\) nor in the vocabulary, 0 to 10"):
            linear_cross_entropy(x, weight, None, torch.tensor([0, label, 3]))
