# SPDX-License-Identifier: Apache-2.0
"""The definition itself: against PyTorch's attention, scalar Philox, finite differences and the ops' argument lists."""

import itertools
import math

import pytest
import torch
from numerics import assert_as_accurate_as

from flash_models import layouts
from flash_models.reference import (
    attention_reference,
    dropout_mask,
    dropout_threshold,
    reference_backward,
    reference_forward,
)

SEED = -0x0123456789ABCDEF


def qkv(batch, seqlen_q, seqlen_k, heads, head_dim, device):
    shapes = [(batch, length, heads, head_dim) for length in (seqlen_q, seqlen_k, seqlen_k)]
    return [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (13, 29), (29, 13)])
@pytest.mark.parametrize("causal", [False, True])
def test_matches_scaled_dot_product_attention(device, seqlen_q, seqlen_k, causal):
    q, k, v = qkv(2, seqlen_q, seqlen_k, 3, 8, device)
    out, lse = attention_reference(q, k, v, causal=causal)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    visible = visible.tril(seqlen_k - seqlen_q) if causal else visible
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=visible
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
    torch.testing.assert_close(lse, scores.masked_fill(~visible, -torch.inf).logsumexp(-1))
    if causal and seqlen_q > seqlen_k:  # the first queries see no key
        assert (out[:, : seqlen_q - seqlen_k] == 0).all() and (lse[..., : seqlen_q - seqlen_k] == -torch.inf).all()


def test_definition_is_differentiable(device):
    q, k, v = qkv(1, 5, 7, 2, 4, device)
    kv_range = torch.tensor([[3, 6]], device=device)  # query 0 sees keys 0 to 2: none
    rng_state = torch.tensor([SEED, 3], device=device)

    def function(q, k, v):
        return attention_reference(
            q, k, v, causal=True, scale=0.7, kv_range=kv_range, dropout_p=0.3, rng_state=rng_state
        )[0]

    assert torch.autograd.gradcheck(function, (q, k, v))


def philox_by_hand(counter, key):
    """Philox4x32 in Python integers: its words after eight rounds, and after six."""
    c, k, words = list(counter), list(key), []
    for done in range(8):
        words += c if done == 6 else []
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c + words


def test_dropout_mask_by_hand(device):
    batch, heads, seqlen_q, seqlen_k, offset = 2, 2, 35, 41, 2**40 + 7
    mask = dropout_mask(torch.tensor([SEED, offset], device=device), 0.3, batch, heads, seqlen_q, seqlen_k)
    assert mask.shape == (batch, heads, seqlen_q, seqlen_k)
    for b, h, row, col in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).tolist():
        lane = (col // 32) * 32 + (row % 8) * 4 + (col % 8) // 2
        counter = lane, row // 32, b * heads + h, offset & 0xFFFFFFFF
        words = philox_by_hand(counter, (SEED & 0xFFFFFFFF, SEED >> 32 & 0xFFFFFFFF))
        bit = 8 * ((row % 16) // 8 * 2 + col % 2) + 7 - (row % 32 // 16 * 4 + col % 32 // 8)
        number = sum((word >> bit & 1) << (7 - place) for place, word in enumerate(words))
        assert mask[b, h, row, col].item() == (number >= 77), (b, h, row, col)  # round(256 * 0.3)


def test_dropout_mask_is_fair_and_independent(device):
    rng_state = torch.tensor([SEED, 0], device=device)
    mask = dropout_mask(rng_state, 0.25, 4, 4, 256, 256).double()
    deviation = math.sqrt(0.25 * 0.75 / 256)
    for dims in ((2, 3), (0, 1, 3), (0, 1, 2)):  # over each head, row and column
        kept = mask.mean(dims)
        assert (kept - 0.75).abs().max() < 6 * deviation
    other = dropout_mask(torch.tensor([SEED, 1], device=device), 0.25, 4, 4, 256, 256).double()
    assert abs((mask * other).mean() - 0.75**2) < 6 * 0.5 / math.sqrt(mask.numel())


def test_dropout_numbers_are_uniform_and_independent(device):
    """All 8 bits of them: how often each of 256 numbers comes, and each pair of what two neighbours drop."""
    rng_state = torch.tensor([SEED, 3], device=device)
    kept = [dropout_mask(rng_state, n / 256, 2, 2, 256, 256) for n in range(256)]
    counts = torch.stack([a.sum() - b.sum() for a, b in itertools.pairwise([*kept, torch.zeros(())])]).double()
    expected = kept[0].numel() / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 6 * math.sqrt(2 * 255)
    dropped = ~kept[26]
    for dims, step in ((-1, 1), (-2, 1), (-1, 8), (-2, 8), (-2, 16), (-2, 32), (-1, 32)):
        pairs = (dropped & dropped.roll(step, dims)).double().mean()
        p = 26 / 256
        assert abs(pairs - p * p) < 6 * p * math.sqrt((1 - p * p) / dropped.numel())


@pytest.mark.parametrize("p, threshold", [(0.0, 0), (0.001, 0), (0.1, 26), (0.5, 128), (0.999, 255), (1.0, 255)])
def test_dropout_threshold(p, threshold):
    assert dropout_threshold(p) == threshold


def test_dropout_keeps_the_mean(device):
    q, k, v = qkv(1, 64, 64, 4, 16, device)
    plain, _ = attention_reference(q, k, v)
    rng_state = torch.tensor([[SEED, n] for n in range(200)], device=device)
    dropped = sum(attention_reference(q, k, v, dropout_p=0.1, rng_state=state)[0] for state in rng_state) / 200
    assert (dropped - plain).abs().mean() < 0.05 * plain.abs().mean()


def op_arguments(q, k, v, *, kv_range=None, cu_seqlens=None, layout=None, rng_state=None, dropout_p=0.0, causal=False):
    blocks = ()
    if layout is not None:
        blocks = (layout.row_start, layout.row_index, layout.col_start, layout.col_index, None, None, layout.block_size)
    length = q.shape[0 if cu_seqlens is not None else 1]
    return (
        q, k, v, None, causal, False, False, kv_range, dropout_p, rng_state, cu_seqlens, cu_seqlens, length, length,
        *blocks,
    )  # fmt: skip


@pytest.mark.parametrize("case", ["dense", "padding", "packed", "blocks", "everything"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_op_forward_and_backward(device, case, dtype):
    length, heads = 200, 2
    options = {}
    if case in ("padding", "everything"):
        options["kv_range"] = torch.tensor([[0, 150], [7, 200], [0, 0]], dtype=torch.int32, device=device)
    if case in ("blocks", "everything"):
        options["layout"] = layouts.from_block_mask(
            torch.rand(heads, 4, 4, device=device) < 0.5, length, length, block_size=64
        )
    if case == "everything":
        options.update(causal=True, dropout_p=0.2, rng_state=torch.tensor([SEED, 1], device=device))
    wide = [t.detach() for t in qkv(3, length, length, heads, 8, device)]
    if case == "packed":
        wide = [t[0] for t in wide]
        options["cu_seqlens"] = torch.tensor([0, 60, 61, 61, 190], dtype=torch.int32, device=device)
    narrow = [t.to(dtype) for t in wide]
    leaves = [t.double().requires_grad_() for t in narrow]
    named = {"cu_seqlens_q": options["cu_seqlens"], "cu_seqlens_k": options["cu_seqlens"]} if case == "packed" else {}
    named.update({name: value for name, value in options.items() if name != "cu_seqlens"})
    truth, truth_lse = attention_reference(*leaves, **named)
    dout = torch.randn_like(truth).to(dtype)
    truth_grads = torch.autograd.grad(truth, leaves, dout.double())

    arguments = op_arguments(*narrow, **options)
    out, lse = reference_forward(*arguments)
    grads = reference_backward(dout, out, lse, *arguments)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    relative = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for result, exact in zip((out, lse, *grads), (truth, truth_lse, *truth_grads), strict=True):
        torch.testing.assert_close(result.double(), exact.detach(), atol=relative, rtol=relative)
    if case == "packed":
        assert (out[190:] == 0).all() and all((grad[190:] == 0).all() for grad in grads)
    if case == "padding":
        assert (out[2] == 0).all() and (lse[2] == -torch.inf).all() and all((grad[2] == 0).all() for grad in grads)


def test_packed_sequences_are_separate(device):
    lengths = [5, 1, 17]
    q, k, v = (t.detach()[0] for t in qkv(1, sum(lengths), sum(lengths), 2, 8, device))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    rng_state = torch.tensor([SEED, 0], device=device)
    out, lse = attention_reference(
        q, k, v, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, dropout_p=0.5, rng_state=rng_state
    )
    for b, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        # as sequence b of a batch of three equal ones, because the dropout mask depends on b
        one = [t[begin:end].expand(3, -1, -1, -1) for t in (q, k, v)]
        expected, expected_lse = attention_reference(*one, causal=True, dropout_p=0.5, rng_state=rng_state)
        torch.testing.assert_close(out[begin:end], expected[b])
        torch.testing.assert_close(lse[:, begin:end], expected_lse[b])


def test_comparison_notices_errors():
    truth = torch.tensor([1.0, 2.0, -torch.inf], dtype=torch.float64)
    plain = truth.float() + torch.tensor([0.0, 1e-3, 0.0])
    assert_as_accurate_as(plain, plain, truth)
    with pytest.raises(AssertionError, match=r"worst at \(0,\)"):
        assert_as_accurate_as(truth.float() + torch.tensor([3e-3, 0.0, 0.0]), plain, truth)
    with pytest.raises(AssertionError, match=r"-inf, first at \(2,\)"):
        assert_as_accurate_as(torch.tensor([1.0, 2.0, 0.0]), plain, truth)
    with pytest.raises(AssertionError, match=r"NaN, first at \(1,\)"):
        assert_as_accurate_as(torch.tensor([1.0, torch.nan, -torch.inf]), plain, truth)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate_as(torch.zeros(2), plain, truth)
