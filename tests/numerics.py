# SPDX-License-Identifier: Apache-2.0
"""How close is close enough: as close as plain PyTorch comes in the same dtype, not a number chosen by taste."""

import torch

# Sums of unit-size numbers in float32 leave this much where the exact result is zero.
FLOAT32_NOISE = 4e-6


def _first(where):
    """Coordinate of the first True of a bool tensor, as a tuple."""
    return tuple(torch.nonzero(where)[0].tolist())


def assert_as_accurate_as(actual, plain, truth, *, name="result", factor=2.0, noise=FLOAT32_NOISE):
    """Assert that `actual` errs at most `factor` times as much as `plain`, both measured against `truth`.

    actual: what is tested. plain: the same by plain PyTorch in the same dtype. truth: the same in float64. Infinities
    and NaNs must sit in the same places before any tolerance is asked. On top of factor * the largest error of `plain`
    come two roundings of the largest finite value, and `noise`, meant for inputs of unit size. A failure names
    the worst coordinate.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    got, plain, truth = (t.detach().to("cpu", torch.float64) for t in (actual, plain, truth))
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(got) != test(truth)
        if wrong.any():
            at = _first(wrong)
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} entries differ in being {kind}, "
                f"first at {at}: got {got[at].item()}, expected {truth[at].item()}"
            )
    finite = torch.isfinite(truth)
    if not finite.any():
        return
    error = torch.where(finite, got - truth, 0).abs()
    allowed = factor * torch.where(finite & torch.isfinite(plain), plain - truth, 0).abs().max().item()
    allowed += 2 * torch.finfo(actual.dtype).eps * truth[finite].abs().max().item() + noise
    if error.max() > allowed:
        at = _first(error == error.max())
        raise AssertionError(
            f"{name}: error {error.max():.3e} exceeds {allowed:.3e}; worst at {at}: got {got[at].item():.9g}, expected "
            f"{truth[at].item():.9g}, plain PyTorch {plain[at].item():.9g}; {int((error > allowed).sum())} of "
            f"{error.numel()} entries are beyond the bound"
        )
