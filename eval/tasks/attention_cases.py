# SPDX-License-Identifier: Apache-2.0
"""What bench_attention.py times: shapes, masks, and the peers that compute the same."""

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash_models
from flash_models import layouts


@dataclass(frozen=True)
class Case:
    head_dim: int
    causal: bool
    seqlen: int
    batch: int
    heads: int
    dropout: float = 0.0
    window: int | None = None  # tokens; None is dense
    n_global: int = 0
    padded: bool = False  # lengths from S / 4 to S, evenly spread over the batch

    def layout(self, device):
        """The block layout, None where dense."""
        if self.window is None:
            return None
        return layouts.local_global(self.seqlen, self.window, self.n_global, device=device)

    def lengths(self, device):
        """Valid keys of each sequence, int32 (B,)."""
        first = self.seqlen // 4 if self.padded else self.seqlen
        return torch.linspace(first, self.seqlen, self.batch, device=device).int()

    def options(self, device):
        """The arguments of `flash_models.attention` beside q, k, v."""
        options = {"causal": self.causal, "dropout_p": self.dropout, "layout": self.layout(device)}
        if self.padded:
            ends = self.lengths(device)
            options["kv_range"] = torch.stack((torch.zeros_like(ends), ends), dim=1)
        return options

    def flop(self, density):
        """Of the forward pass."""
        keys = self.lengths("cpu").sum().item()
        return 4 * self.heads * self.seqlen * keys * self.head_dim * density * (0.5 if self.causal else 1)


def dense_cases(device, quick, dropouts):
    """Full and causal; on a CPU also three bands of the longest."""
    if device.type == "cpu":
        lengths = [512, 2048] if quick else [512, 1024, 2048, 4096]
        bands = [Case(64, False, lengths[-1], 1, 4, window=lengths[-1] // part) for part in (16, 8, 4)]
        return [Case(64, causal, seqlen, 1, 4) for causal in (False, True) for seqlen in lengths] + bands
    lengths = [1024, 4096, 16384] if quick else [512, 1024, 2048, 4096, 8192, 16384]
    return [
        Case(head_dim, causal, seqlen, 16384 // seqlen, 2048 // head_dim, dropout)
        for dropout in ([0.0] if quick else dropouts)
        for head_dim in (64, 128)
        for causal in (False, True)
        for seqlen in lengths
    ]


def padded_cases(device, quick):
    """Batches of 8 with lengths from S / 4 to S."""
    if device.type == "cpu":
        return [Case(64, False, seqlen, 4, 4, padded=True) for seqlen in ([512] if quick else [512, 1024])]
    lengths = [1024] if quick else [512, 1024, 2048, 4096]
    return [Case(64, False, seqlen, 8, 32, padded=True) for seqlen in lengths]


def sparse_cases(device, quick):
    """Bands of several widths with a global block, and, for the speed-up, density 1."""
    if device.type == "cpu":
        shapes = [(1024 if quick else 4096, 4)]
    else:
        shapes = [(16384, 16)] if quick else [(16384, 16), (65536, 4)]
    return [
        Case(64, False, seqlen, 1, heads, window=window, n_global=128)
        for seqlen, heads in shapes
        for window in (seqlen, seqlen // 4, seqlen // 16, seqlen // 64, seqlen // 256)
    ]


def _sdpa(case, backends=None, mask=None):
    def call(q, k, v):
        options = {"attn_mask": mask, "is_causal": case.causal and mask is None, "dropout_p": case.dropout}
        if backends is None:
            return scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(backends):
            return scaled_dot_product_attention(q, k, v, **options)

    return call


def _flex(case, device):
    """flex_attention, compiled, with the case's blocks as its own."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks = case.layout(device).to_dense()[None]  # (1, 1, nq, nk)
    counts = blocks.sum(-1, dtype=torch.int32)
    order = (~blocks).int().argsort(dim=-1, stable=True).int()  # the listed blocks of a row first
    none = torch.zeros_like(counts)
    mask = BlockMask.from_kv_blocks(none, order, counts, order, BLOCK_SIZE=128)
    torch._functorch.config.donated_buffer = False  # or its backward could not be timed from a retained graph
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def peers(case, device):
    """name -> (function of q, k, v; whether it wants heads before the sequence)."""
    options = case.options(device)
    found = {"flash_models": (lambda q, k, v: flash_models.attention(q, k, v, **options), False)}
    if case.padded:  # the mask that Hugging Face passes, and the backend that PyTorch then chooses
        visible = torch.arange(case.seqlen, device=device) < case.lengths(device)[:, None]
        mask = visible[:, None, None, :].expand(-1, 1, case.seqlen, -1)
        return found | {"sdpa": (_sdpa(case, mask=mask), True)}
    if device.type == "cpu":
        return found | {"sdpa": (_sdpa(case, [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), True)}
    if case.window is not None:
        found |= {"dense": (lambda q, k, v: flash_models.attention(q, k, v, causal=case.causal), False)}
        return found | {"flex": (_flex(case, device), True)}
    found |= {"fa2": (_sdpa(case, [SDPBackend.FLASH_ATTENTION]), True)}
    return found | {"cudnn": (_sdpa(case, [SDPBackend.CUDNN_ATTENTION]), True)}
