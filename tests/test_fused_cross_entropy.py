# SPDX-License-Identifier: Apache-2.0
"""The loss of flash_models.fused that never holds all logits, plain and as Triton kernels; see fused_case.py."""

import pytest
import torch
from fused_case import check, target
from torch.nn import functional as F

from flash_models.fused import cross_entropy, linear_cross_entropy

__all__ = ["target"]


def test_a_captured_graph_projects_every_token(target, monkeypatch):
    """It cannot know how many have a label: the others, marked by -1, give no loss and no gradient."""
    device, _ = target
    labels = torch.tensor([3, -100, 0, -100, 5], device=device)
    everything = (None, torch.where(labels == -100, -1, labels))
    monkeypatch.setattr(cross_entropy, "_select", lambda x, *rest: (everything[0], x, everything[1]))
    check(
        lambda x, w: linear_cross_entropy(x, w, None, labels),
        lambda x, w: F.cross_entropy((x @ w.t()).to(torch.promote_types(x.dtype, torch.float32)), labels),
        target, (5, 24), (97, 24),
    )  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("limit", [1, 30_000, 1 << 30], ids=["rows of one", "chunks", "whole"])
def test_linear_cross_entropy(target, monkeypatch, limit, reduction, bias):
    device, dtype = target
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS_BYTES", {device.type: limit})
    rows, columns, vocabulary = (5, 24, 97) if limit == 1 else (150, 24, 97)
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    labels[::4] = -100

    def reference(x, w, b=None):
        return F.cross_entropy(F.linear(x, w, b).to(torch.promote_types(x.dtype, torch.float32)), labels,
                               reduction=reduction)  # fmt: skip

    def ours(x, w, b=None):
        return linear_cross_entropy(x, w, b, labels, reduction=reduction)

    check(ours, reference, target, (rows, columns), (vocabulary, columns), *([(vocabulary,)] if bias else []))


def test_linear_cross_entropy_in_float16_does_not_overflow(target):
    """The gradient of the vocabulary's weight is the sum over many tokens of one label; a scaled loss scales it."""
    device, _ = target
    x = (30 * torch.ones(5000, 16, device=device)).half()
    weight = torch.zeros(64, 16, device=device).half().requires_grad_()
    labels = torch.zeros(5000, dtype=torch.long, device=device)
    (linear_cross_entropy(x, weight, None, labels) * 64).backward()
    assert weight.grad[0, 0].item() == pytest.approx(-(63 / 64) * 30 * 64, rel=0.01)


def test_linear_cross_entropy_needs_only_what_is_asked_for(target):
    device, dtype = target
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
