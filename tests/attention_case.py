# SPDX-License-Identifier: Apache-2.0
"""A call of `attention`, its inputs, and its comparison with the definition: what the tests of the op share."""

import torch
from numerics import FLOAT32_NOISE, assert_as_accurate_as

from flash_models import attention, layouts
from flash_models.reference import attention_reference

DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16, torch.float16)}


def random_qkv(seqlen_q, seqlen_k, *, batch=2, heads=2, head_dim=64, device, dtype):
    """q, k, v, normal and of unit variance; packed (T, H, D) with `batch=None`."""
    lead = () if batch is None else (batch,)
    shapes = [(*lead, seqlen, heads, head_dim) for seqlen in (seqlen_q, seqlen_k, seqlen_k)]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def packed(lengths, device):
    """Offsets of sequences of the given lengths."""
    return int32([0, *torch.tensor(lengths).cumsum(0).tolist()], device)


def random_layout(seqlen_q, seqlen_k, block_size, heads, device, density=0.4):
    """Random blocks with, where there is room, one row and one column of blocks that list nothing."""
    shape = (heads, -(-seqlen_q // block_size), -(-seqlen_k // block_size))
    mask = torch.rand(shape) < density
    if shape[1] > 2:
        mask[:, 1] = False
    if shape[2] > 2:
        mask[:, :, 2] = False
    return layouts.from_block_mask(mask.to(device), seqlen_q, seqlen_k, block_size)


def gradients(out, inputs, dout):
    return torch.autograd.grad(out, inputs, dout)


def rounded_output_noise(out, dout, other, scale):
    """What dq and dk owe to rowsum(dout * out) being taken from the rounded output (FlashAttention, Algorithm 4).

    Each of its terms errs by up to eps / 2 of itself, at random, so the sum by eps / (2 sqrt 3) times their norm; the
    factor eps is 3.5 standard deviations. Times scale and the other operand it enters the gradient. Plain PyTorch
    keeps the probabilities and is exact where a query sees a single key.
    """
    if not out.numel() or not other.numel():
        return 0.0
    scale = abs(out.shape[-1] ** -0.5 if scale is None else scale)
    row = (out.nan_to_num() * dout).norm(dim=-1).max().item()
    return torch.finfo(dout.dtype).eps * row * scale * other.abs().max().item()


def check(q, k, v, *, dout=None, seed=0, deterministic=False, max_seqlen_q=None, max_seqlen_k=None, **options):
    """Compare out, lse, dq, dk, dv of the kernel and of plain PyTorch with the truth in float64."""
    dout = torch.randn(q.shape, device=q.device).to(q.dtype) if dout is None else dout
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    torch.manual_seed(seed)
    kernel_options = {"deterministic": deterministic, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    out, lse = attention(*inputs, **options, **kernel_options, return_lse=True)
    results = [out, lse, *gradients(out, inputs, dout)]
    assert out.shape == q.shape and out.dtype == q.dtype and lse.dtype == torch.float32

    if options.get("dropout_p"):
        torch.manual_seed(seed)  # what `attention` drew
        options["rng_state"] = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=q.device)
    expected = []
    for dtype in (q.dtype, torch.float64):
        wide = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out, lse = attention_reference(*wide, **options, dtype=dtype)
        expected.append([out, lse, *gradients(out, wide, dout.to(dtype))])
    # The gradients' probabilities are exp(score - lse) of an lse in float32: its rounding is their relative error.
    scores = max(1, expected[1][1].nan_to_num(0, 0, 0).abs().max().item()) if lse.numel() else 1
    for name, result, plain, truth in zip(("out", "lse", "dq", "dk", "dv"), results, *expected, strict=True):
        size = max(1, truth.nan_to_num(0, 0, 0).abs().max().item()) if truth.numel() else 1
        noise = FLOAT32_NOISE + 1.2e-7 * scores * size
        if name in ("dq", "dk"):
            noise += rounded_output_noise(expected[1][0], dout, k if name == "dq" else q, options.get("scale"))
        assert_as_accurate_as(result, plain, truth, name=name, noise=noise)
