# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees, and which weights are dropped: `kv_range`, packed sequences, layouts and dropout."""

import dataclasses

import pytest
import torch
from attention_case import check, gradients, int32, packed, random_layout, random_qkv

from flash_models import attention, layouts
from flash_models._schedule import make_schedule
from flash_models.reference import dropout_mask, dropout_threshold

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(113, 203), (130, 64), (1, 300), (3, 1300)])
def test_kv_range(seqlen_q, seqlen_k, causal, target):
    ranges = [[0, seqlen_k], [0, 1], [37, seqlen_k], [seqlen_k - 1, seqlen_k], [5, 61], [9, 9], [50, 20]]
    q, k, v = random_qkv(seqlen_q, seqlen_k, batch=len(ranges), **target)
    check(q, k, v, kv_range=int32(ranges, q.device), causal=causal)


def test_rows_without_keys_are_zero(one_dtype):
    q, k, v = (t.requires_grad_() for t in random_qkv(90, 40, **one_dtype))
    kv_range = int32([[7, 7], [0, 40]], q.device)
    out, lse = attention(q, k, v, causal=True, kv_range=kv_range, return_lse=True)
    grads = gradients(out, (q, k, v), torch.randn_like(out))
    assert not out[0].any() and (lse[0] == -torch.inf).all() and not any(grad[0].any() for grad in grads)
    assert not out[1, :50].any() and (lse[1, :, :50] == -torch.inf).all() and not grads[0][1, :50].any()
    assert out[1, 50:].all() and lse[1, :, 50:].isfinite().all()


PACKED = [[(63, 63)], [(1, 1), (200, 200), (3, 3)], [(113, 203), (0, 50), (60, 0), (0, 0), (130, 64)]]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", PACKED, ids=["one", "self", "empty_and_cross"])
def test_packed(lengths, causal, target):
    q_lengths, k_lengths = zip(*lengths, strict=True)
    q, k, v = random_qkv(sum(q_lengths), sum(k_lengths), batch=None, **target)
    cu_seqlens = {"cu_seqlens_q": packed(q_lengths, q.device), "cu_seqlens_k": packed(k_lengths, q.device)}
    check(q, k, v, **cu_seqlens, max_seqlen_q=max(q_lengths), max_seqlen_k=max(k_lengths) + 3, causal=causal)


def test_packed_equals_padded(one_dtype):
    lengths, longest = [40, 129, 7], 129
    q, k, v = random_qkv(longest, longest, batch=3, **one_dtype)
    kv_range = int32([[0, length] for length in lengths], q.device)
    padded = attention(q, k, v, kv_range=kv_range)
    cu_seqlens = packed(lengths, q.device)
    pack = [torch.cat([t[b, :length] for b, length in enumerate(lengths)]) for t in (q, k, v)]
    out = attention(*pack, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest)
    expected = torch.cat([padded[b, :length] for b, length in enumerate(lengths)])
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-5 if one_dtype["dtype"] == torch.float32 else 1e-2)


def test_packed_sequences_do_not_touch(one_dtype):
    """A sequence of NaN, and tokens that belong to no sequence, leave the others alone."""
    lengths = [50, 70, 33]
    q, k, v = random_qkv(sum(lengths) + 20, sum(lengths) + 20, batch=None, **one_dtype)
    for t in (q, k, v):
        t[50:120] = torch.nan
        t[153:] = torch.nan
        t.requires_grad_()
    cu_seqlens = packed(lengths, q.device)
    out = attention(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=70, max_seqlen_k=70)
    for result in (out, *gradients(out, (q, k, v), torch.ones_like(out))):
        assert result[:50].isfinite().all() and result[120:153].isfinite().all()
        assert not result[153:].any()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("layout_heads", [1, 3], ids=["shared", "per_head"])
def test_random_layout(layout_heads, block_size, causal, target):
    q, k, v = random_qkv(513, 449, heads=3, **target)
    check(q, k, v, layout=random_layout(513, 449, block_size, layout_heads, q.device), causal=causal)


@pytest.mark.parametrize("head_dim", [64, 128], ids=lambda d: f"D{d}")
@pytest.mark.parametrize("mask", ["causal", "kv_range", "layout"])
def test_many_tiles(mask, head_dim, one_dtype):
    """More tiles than a GPU takes at once, so that each CTA walks several, some of which nobody sees.

    dk and dv are sums in a fixed order also where dq is not: that they never differ says that no tile met what was
    loaded for another.
    """
    device = one_dtype["device"]
    heads = 16 if device.type == "cuda" else 1
    q, k, v = random_qkv(390, 449, batch=6, heads=heads, head_dim=head_dim, **one_dtype)
    options = {
        "causal": {"causal": True},
        "kv_range": {"kv_range": int32([[0, 449], [0, 60], [130, 380], [9, 9], [448, 449], [0, 257]], device)},
        "layout": {"layout": random_layout(390, 449, 128, heads, device, density=0.5)},
    }
    check(q, k, v, **options[mask])
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = attention(*inputs, **options[mask])
    dout = torch.randn_like(out)
    first, *others = (torch.autograd.grad(out, inputs, dout, retain_graph=True) for _ in range(10))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first[1:], other[1:], strict=True))


@pytest.mark.parametrize("causal, dropout_p", [(False, 0.0), (True, 0.2)], ids=["full", "causal_dropout"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("layout_heads", [1, 2], ids=["shared", "per_head"])
def test_long_lines(layout_heads, block_size, causal, dropout_p, one_dtype):
    """A row and a column of blocks that list many times more than the others, which CUDA kernels cut into pieces."""
    mask = torch.eye(7, 9, dtype=torch.bool).repeat(layout_heads, 1, 1)
    mask[:, 5], mask[:, :, 2] = True, True
    seqlen_q, seqlen_k = 7 * block_size - 9, 9 * block_size - 30
    layout = layouts.from_block_mask(mask.to(one_dtype["device"]), seqlen_q, seqlen_k, block_size)
    # so that the tests meet what they are for, with fewer blocks than would be worth it
    items = [
        make_schedule(start, 4, max_length=9, max_listed=layout.max_listed, max_partial=3 * layout_heads)
        for start in (layout.row_start, layout.col_start)
    ]
    layout = dataclasses.replace(layout, row_items=items[0], col_items=items[1])
    assert all((item[:, 3] >= 0).sum() >= 2 * layout_heads for item in items)
    q, k, v = random_qkv(seqlen_q, seqlen_k, heads=2, **one_dtype)
    kv_range = int32([[0, seqlen_k], [100, seqlen_k - 150]], q.device)
    for deterministic in (False, True):
        check(
            q, k, v, layout=layout, causal=causal, dropout_p=dropout_p, kv_range=kv_range, deterministic=deterministic
        )


PATTERNS = {
    "dense": lambda **options: layouts.dense(500, **options),
    "local": lambda **options: layouts.local(500, 100, **options),
    "local_global": lambda **options: layouts.local_global(500, 64, 10, **options),
    "bigbird": lambda **options: layouts.bigbird(500, 64, 64, 1, **options),
    "strided": lambda **options: layouts.strided(500, 192, **options),
    "butterfly": lambda **options: layouts.butterfly(500, **options),
    "grid_2d": lambda **options: layouts.grid_2d(24, 16, 1, 64, **options),
    "per_head": lambda **options: layouts.per_head(
        [layouts.local(500, 0, **options), layouts.bigbird(500, 0, 0, 1, **options)]
    ),
}


@pytest.mark.parametrize("head_dim", [32, 64, 128], ids=lambda d: f"D{d}")
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern(name, head_dim, one_dtype):
    layout = PATTERNS[name](block_size=64, device=one_dtype["device"])
    q, k, v = random_qkv(layout.seqlen_q, layout.seqlen_k, batch=1, head_dim=head_dim, **one_dtype)
    check(q, k, v, layout=layout)


@pytest.mark.parametrize("name", ["bigbird", "per_head"])
def test_pattern_under_the_other_masks(name, target):
    """Causal, padding and dropout cut into the listed blocks, of heads that may share their lists."""
    layout = PATTERNS[name](block_size=64, device=target["device"])
    q, k, v = random_qkv(500, 500, batch=2, heads=2, **target)
    kv_range = int32([[0, 500], [70, 333]], q.device)
    check(q, k, v, layout=layout, causal=True, kv_range=kv_range, dropout_p=0.2, seed=5)


@pytest.mark.parametrize("block_size", [64, 128])
def test_rows_and_columns_without_blocks_are_zero(block_size, one_dtype):
    """Also where the lists around them are long: out and every gradient exactly 0, lse -inf."""
    mask = torch.rand(3, 6, 7) < 0.3
    mask[:, 0], mask[:, :, 0] = True, True
    mask[0, [1, 5]], mask[1, :, [2, 6]], mask[2] = False, False, False
    device = one_dtype["device"]
    layout = layouts.from_block_mask(mask.to(device), 6 * block_size - 3, 7 * block_size - 50, block_size)
    q, k, v = random_qkv(layout.seqlen_q, layout.seqlen_k, batch=1, heads=3, **one_dtype)
    check(q, k, v, layout=layout)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out, lse = attention(*inputs, layout=layout, return_lse=True)
    grads = gradients(out, inputs, torch.randn_like(out))
    seen = layout.token_mask()
    rows, columns = ~seen.any(2).T, ~seen.any(1).T  # (S, H)
    assert rows.any() and columns.any()
    assert not out[0][rows].any() and not grads[0][0][rows].any() and (lse[0].T[rows] == -torch.inf).all()
    assert not grads[1][0][columns].any() and not grads[2][0][columns].any()


def test_empty_layout(one_dtype):
    q, k, v = random_qkv(130, 190, **one_dtype)
    nothing = layouts.from_block_mask(torch.zeros(3, 3, dtype=torch.bool, device=q.device), 130, 190, 64)
    check(q, k, v, layout=nothing)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_dropout(causal, dropout_p, target):
    check(*random_qkv(113, 203, **target), causal=causal, dropout_p=dropout_p, seed=7)


def test_dropout_mask_is_the_defined_one(one_dtype):
    """With equal scores and one-hot values, out is the mask: every entry is compared, in blocks of 128 columns."""
    batch, heads, seqlen_q, seqlen_k, dropout_p = 2, 3, 150, 260, 0.3
    q, k, v = (torch.zeros_like(t) for t in random_qkv(seqlen_q, seqlen_k, heads=heads, head_dim=128, **one_dtype))
    torch.manual_seed(3)
    rng_state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=q.device)
    expected = dropout_mask(rng_state, dropout_p, batch, heads, seqlen_q, seqlen_k)
    for first in range(0, seqlen_k, 128):
        width = min(128, seqlen_k - first)
        one_hot = v.clone()
        one_hot[:, first : first + width] = torch.eye(128, device=q.device)[:width, None].to(v.dtype)
        torch.manual_seed(3)
        out = attention(q, k, one_hot.requires_grad_(), dropout_p=dropout_p)
        assert torch.equal(out[..., :width].transpose(1, 2) > 0, expected[..., first : first + width])
        kept = 256 / (256 - dropout_threshold(dropout_p)) / seqlen_k
        torch.testing.assert_close(out.max().item(), kept, rtol=1e-2, atol=0)
    for first in range(0, seqlen_q, 128):  # and dv is its transpose
        height = min(128, seqlen_q - first)
        dout = torch.zeros_like(q)
        dout[:, first : first + height] = torch.eye(128, device=q.device)[:height, None].to(q.dtype)
        torch.manual_seed(3)
        leaf = v.clone().requires_grad_()
        (dv,) = gradients(attention(q, k, leaf, dropout_p=dropout_p), (leaf,), dout)
        assert torch.equal(dv[..., :height].permute(0, 2, 3, 1) > 0, expected[:, :, first : first + height])


def test_dropout_statistics(one_dtype):
    """The right share is dropped, the expectation is kept, and every call draws anew."""
    q, k, v = random_qkv(256, 512, batch=4, heads=4, head_dim=16, **one_dtype)
    q, v = torch.zeros_like(q), torch.ones_like(v)
    outs = [attention(q, k, v, dropout_p=0.1)[..., 0].float() for _ in range(2)]
    assert not torch.equal(*outs)
    threshold = dropout_threshold(0.1)
    share = threshold / 256
    deviation = (share / (1 - share) / 512) ** 0.5  # of one row's mean
    for out in outs:
        assert abs(out.mean() - 1) < 5 * deviation / out.numel() ** 0.5 + 1e-3
        assert 0.9 < out.std() / deviation < 1.1
