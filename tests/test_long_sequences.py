# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention over sequences that no mask or score matrix could be held for; on CUDA alone."""

import pytest
import torch

from flash_models import attention
from flash_models.layouts import local_global

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def inputs(length, heads):
    shape = 4, 1, length, heads, 64
    q, k, v, dout = torch.randn(shape, device="cuda", dtype=torch.bfloat16).unbind(0)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def listed_keys(layout, row, length):
    """The keys that query `row` sees."""
    block = row // layout.block_size
    first, last = layout.row_start[0, block : block + 2].tolist()
    blocks = layout.row_index[first:last].long()
    keys = (blocks[:, None] * layout.block_size + torch.arange(layout.block_size, device=blocks.device)).flatten()
    return keys[keys < length]


def test_262144_tokens():
    """Output and dq of some rows, each against float64 over the keys that it sees."""
    torch.manual_seed(0)
    length, heads = 2**18 - 37, 2
    layout = local_global(length, 256, 128, device="cuda")
    q, k, v, dout = inputs(length, heads)
    out = attention(q, k, v, layout=layout)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert dk.isfinite().all() and dv.isfinite().all()
    for row in (0, 127, 128, 70_001, length - 129, length - 1):
        keys = listed_keys(layout, row, length)
        q_row, dout_row = q[0, row].double(), dout[0, row].double()
        k_seen, v_seen = k[0, keys].double(), v[0, keys].double()
        p = torch.einsum("hd,khd->hk", q_row, k_seen).div(8).softmax(-1)
        expected = torch.einsum("hk,khd->hd", p, v_seen)
        dp = torch.einsum("hd,khd->hk", dout_row, v_seen)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / 8
        expected_dq = torch.einsum("hk,khd->hd", ds, k_seen)
        for found, exact in ((out[0, row], expected), (dq[0, row], expected_dq)):
            assert (found - exact).norm() <= 0.02 * exact.norm(), row


def test_memory_of_65536_tokens():
    """Forward and backward of a layer of BERT-base's size: what they return and lse, and beside it, in fp32, a sum of
    dq and the pieces of the lines of global tokens."""
    length, heads = 2**16, 12
    layout = local_global(length, 256, 128, device="cuda")
    q, k, v, dout = inputs(length, heads)
    attention(q, k, v, layout=layout)  # what the layout makes at its first use stays with it
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(attention(q, k, v, layout=layout), (q, k, v), dout)
    used, size = torch.cuda.max_memory_allocated() - before, q.numel() * q.element_size()
    print(f"{used / 2**20:.0f} MiB in addition to q, k, v and dout of {size / 2**20:.0f} MiB each")
    lse, pieces = length * heads * 4, 64 * heads * 128 * (64 + 64) * 4  # dk and dv of 64 slots, for 512 lines
    assert used <= 4 * size + lse + 2 * size + pieces + 0.2 * size
