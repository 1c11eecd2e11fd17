# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run on the CPU by `tests/emulation`, against the reference in float64.

Registered as `emulated_sm80::attention_fwd` / `_bwd` (the portable kernels) and `emulated_sm90` (those for Hopper).
"""

import emulated
import pytest
import torch

from flash_models._layout_ops import block_lists, random_blocks, work_items
from flash_models._schedule import make_schedule
from flash_models.layouts import from_block_mask
from flash_models.reference import attention_reference

pytestmark = pytest.mark.skipif(not emulated.POSSIBLE, reason=emulated.NEEDS)

SOURCES = (
    "attention/cuda.cu",
    "attention/fwd_decode.cu",
    "attention/fwd_sm80.cu",
    "attention/fwd_sm90.cu",
    "attention/bwd_rows.cu",
    "attention/bwd_sm80.cu",
    "attention/bwd_sm90.cu",
    "attention/bwd_dq_sm80.cu",
    "attention/op.cpp",
    "layout/lists.cu",
    "layout/op.cpp",
)


@pytest.fixture(scope="module", params=[80, 90], ids=["sm80", "sm90"], name="emulated")
def emulated_ops(request, tmp_path_factory):
    """The emulated ops, compiled from the kernels as they are now."""
    name = f"emulated_sm{request.param}"
    return emulated.ops(tmp_path_factory.mktemp(name), name, request.param, SOURCES)


CASES = {
    "full": {},
    "one-token": {"seqlens": (1, 1)},
    "short": {"seqlens": (70, 3)},
    "causal": {"causal": True},
    "long": {"seqlens": (200, 700)},  # the rings of K and V go round
    "tall": {"seqlens": (2048, 130)},  # three consumers
    "long-keys-causal": {"seqlens": (150, 4099), "causal": True},  # Q in registers at head dimension 128
    "long-causal": {"seqlens": (390, 390), "causal": True, "dropout_p": 0.1},
    "causal-long-q": {"causal": True, "seqlens": (150, 70)},
    "causal-dealt": {"seqlens": (900, 900), "heads": 3, "causal": True},  # in pairs, then from within a head by size
    "causal-dealt-odd": {"seqlens": (600, 640), "heads": 5, "causal": True},
    "kv-range": {"kv_range": [[5, 70], [9, 9]], "causal": True},
    "kv-range-behind": {"seqlens": (150, 450), "kv_range": [[300, 450], [449, 450]]},  # tiles nobody sees come first
    "block-64": {"block_size": 64},
    "block-128-heads": {"block_size": 128, "heads": 2, "seqlens": (203, 257)},
    "block-64-heads-causal": {"block_size": 64, "heads": 2, "causal": True},
    "block-64-cut": {"block_size": 64, "longest": 1, "seqlens": (203, 450)},
    "block-128-cut": {"block_size": 128, "longest": 1, "seqlens": (203, 657), "heads": 2},
    "block-64-cut-long": {"block_size": 64, "longest": 1, "seqlens": (70, 3700)},  # a line of more than 32 pieces
    "block-64-cut-all": {
        "block_size": 64,
        "longest": 1,
        "dropout_p": 0.2,
        "kv_range": [[0, 70], [40, 190]],
        "causal": True,
        "seqlens": (203, 200),
    },
    "varlen-block-128-cut": {"cu_seqlens": ([0, 65, 65, 300], [0, 150, 150, 470]), "block_size": 128, "longest": 1},
    "decode": {"seqlens": (1, 1100)},  # the keys are split
    "decode-heads": {"seqlens": (3, 300), "heads": 2},
    "decode-causal-kv-range": {"seqlens": (3, 600), "causal": True, "kv_range": [[300, 600], [0, 500]]},
    "decode-cut-kv-range": {"seqlens": (1, 1100), "kv_range": [[300, 1090]]},
    "decode-cut-one-key": {"seqlens": (1, 600), "kv_range": [[599, 600]]},  # one part has no key
    "decode-no-key": {"seqlens": (2, 70), "kv_range": [[9, 9], [69, 70]]},
    "varlen": {"cu_seqlens": ([0, 65, 65, 100], [0, 31, 100, 170])},
    "varlen-causal-block-64": {"cu_seqlens": ([0, 65, 65, 100], [0, 90, 100, 170]), "causal": True, "block_size": 64},
    "dropout": {"dropout_p": 0.3},
    "dropout-block-64-kv-range": {"dropout_p": 0.2, "block_size": 64, "kv_range": [[0, 70], [40, 101]]},
    "deterministic": {"deterministic": True},
    "deterministic-all": {"deterministic": True, "dropout_p": 0.2, "block_size": 128, "causal": True},
}


WALKS = (
    "tall", "long-causal", "causal-dealt", "causal-dealt-odd", "block-64-heads-causal", "block-64-cut-long",
    "varlen-causal-block-64", "dropout-block-64-kv-range",
)  # fmt: skip


@pytest.mark.parametrize(
    "head_dim, dtype", [(16, torch.bfloat16), (64, torch.bfloat16), (80, torch.float16), (128, torch.bfloat16)]
)
@pytest.mark.parametrize("case", CASES)
def test_kernels_match_reference(emulated, case, head_dim, dtype):
    options = dict(CASES[case])
    if head_dim != 64 and case in WALKS:
        pytest.skip("the walk over tiles does not depend on the head dimension")
    seqlen_q, seqlen_k = options.pop("seqlens", (97, 101))
    longest = options.pop("longest", 100)  # blocks of a work item
    deterministic, block_size = options.pop("deterministic", False), options.pop("block_size", 0)
    heads, dropout_p, causal = options.pop("heads", 1), options.pop("dropout_p", 0.0), options.pop("causal", False)
    cu = [torch.tensor(c, dtype=torch.int32) for c in options.pop("cu_seqlens", ())]
    kv_range = torch.tensor(options["kv_range"], dtype=torch.int32) if "kv_range" in options else None
    batch = 1 if kv_range is None else len(kv_range)
    generator = torch.Generator().manual_seed(len(case) + head_dim)
    if cu:
        shapes = [(int(c[-1]), heads, head_dim) for c in (cu[0], cu[1], cu[1], cu[0])]
        seqlen_q, seqlen_k = (int(c.diff().max()) for c in cu)
    else:
        shapes = [(batch, n, heads, head_dim) for n in (seqlen_q, seqlen_k, seqlen_k, seqlen_q)]
    q, k, v, dout = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    layout, blocks = None, (None,) * 6 + (0,)
    if block_size:
        mask = torch.rand(heads, -(-seqlen_q // block_size), -(-seqlen_k // block_size), generator=generator) < 0.6
        layout = from_block_mask(mask, seqlen_q, seqlen_k, block_size)
        items = [
            make_schedule(start, longest, max_length=100, max_listed=mask.numel())
            for start in (layout.row_start, layout.col_start)
        ]
        blocks = (layout.row_start, layout.row_index, layout.col_start, layout.col_index, *items, block_size)
    rng_state = torch.tensor([2**60 + 7, 3]) if dropout_p else None
    scale = head_dim**-0.5
    arguments = (scale, causal, deterministic, False, kv_range, dropout_p, rng_state)
    arguments += (*(cu or (None, None)), seqlen_q, seqlen_k, *blocks)

    out, lse = emulated.attention_fwd(q, k, v, *arguments)
    gradients = emulated.attention_bwd(dout, out, lse, q, k, v, *arguments)

    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = attention_reference(
        *inputs,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        rng_state=rng_state,
        kv_range=kv_range,
        cu_seqlens_q=cu[0] if cu else None,
        cu_seqlens_k=cu[1] if cu else None,
        layout=layout,
    )
    expected_gradients = torch.autograd.grad(expected, inputs, dout.double())
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    eps = torch.finfo(dtype).eps
    results, wanted = (out, *gradients), (expected, *expected_gradients)
    for name, got, want in zip(("out", "dq", "dk", "dv"), results, wanted, strict=True):
        # Rounding P, dS and the result to 16 bits: each a relative eps / 2 of terms that add up like a random walk.
        error = (got.double() - want).norm() / (want.norm() + want.numel() ** 0.5 * 0.1)
        assert error < 2 * eps, f"{name}: relative error {error:.2e}, expected below {2 * eps:.2e}"


@pytest.mark.parametrize("growth", [30, 3000])  # the latter overflows against the reference point of the first keys
def test_scores_that_grow(emulated, growth):
    generator = torch.Generator().manual_seed(growth)
    q, k, v = (torch.randn(1, n, 1, 64, generator=generator) for n in (130, 600, 600))
    k *= torch.linspace(1, growth, 600)[:, None, None]
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    settings = (0.125, False, False, False, None, 0.0, None, None, None, 130, 600, *(None,) * 6, 0)
    out, lse = emulated.attention_fwd(q, k, v, *settings)
    expected, expected_lse = attention_reference(*(x.double() for x in (q, k, v)), scale=0.125)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [-200, -20, 20, 200])
def test_scores_far_from_0(emulated, offset, dtype):
    """Which is the reference point of Hopper's first keys."""
    generator = torch.Generator().manual_seed(offset)
    q, k, v = (torch.randn(1, n, 1, 64, generator=generator) for n in (130, 300, 300))
    q[..., 0], k[..., 0] = 16, offset / 2  # times a scale of 1 / 8
    q, k, v = (x.to(dtype) for x in (q, k, v))
    settings = (0.125, False, False, False, None, 0.0, None, None, None, 130, 300, *(None,) * 6, 0)
    out, lse = emulated.attention_fwd(q, k, v, *settings)
    expected, expected_lse = attention_reference(*(x.double() for x in (q, k, v)), scale=0.125)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out.double(), expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("queries", [1, 130])  # one is a step of generation
def test_scale_of_0(emulated, queries):
    """Every key counts alike; those behind the last one must not, though 0 * -inf is not a number."""
    generator = torch.Generator().manual_seed(queries)
    q, k, v, dout = (torch.randn(1, n, 1, 64, generator=generator).bfloat16() for n in (queries, 200, 200, queries))
    settings = (0.0, False, False, False, None, 0.0, None, None, None, queries, 200, *(None,) * 6, 0)
    out, lse = emulated.attention_fwd(q, k, v, *settings)
    dq, dk, dv = emulated.attention_bwd(dout, out, lse, q, k, v, *settings)
    torch.testing.assert_close(out.double(), v.double().mean(1, keepdim=True).expand_as(out), atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(
        dv.double(), dout.double().sum(1, keepdim=True).expand_as(dv) / 200, atol=2e-3, rtol=1e-2
    )
    assert not dq.any() and not dk.any()


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 40), (3, 65, 33), (2, 300, 9), (1, 3, 1100)])
def test_layouts_are_the_same(emulated, shape, transposed):
    """Lists and work items, against those in plain PyTorch: more lines than threads, more blocks than lanes."""
    generator = torch.Generator().manual_seed(sum(shape))
    mask = torch.rand(shape, generator=generator) < 0.4
    mask[:, 0], mask[0, -1] = True, False
    for arguments in (
        (mask, mask.numel(), transposed, -1, 0),
        (mask, int(mask.sum()), transposed, -1, 0),
        (mask, mask.numel(), transposed, 2, 1),
        (torch.zeros((), dtype=torch.bool).expand(shape), mask.numel(), transposed, 0, 3),
    ):
        lists = emulated.block_lists(*arguments)
        for got, expected in zip(lists, block_lists(*arguments), strict=True):
            assert torch.equal(got, expected)
    for max_blocks, max_partial in ((1, 0), (2, 10), (3, 10**4), (16, 100)):
        items = emulated.work_items(lists[0], max_blocks, max_partial)
        assert torch.equal(items, work_items(lists[0], max_blocks, max_partial))


@pytest.mark.parametrize("arguments", [(1, 0, 0, 1, 0), (40, 2, 1, 3, 7), (65, 0, 9, 65, 2**32 - 1), (33, 40, 2, 4, 1)])
def test_random_blocks_are_the_same(emulated, arguments):
    like = torch.empty(0, dtype=torch.bool)
    assert torch.equal(emulated.random_blocks(like, *arguments), random_blocks(like, *arguments))


def test_packed_sequences_do_not_touch(emulated):
    """Also where a neighbour in memory is NaN, which a tile of queries or keys holds too."""
    lengths = torch.tensor([0, 50, 120, 153], dtype=torch.int32)
    q, k, v = (torch.randn(170, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    for t in (q, k, v):
        t[50:120] = torch.nan
        t[153:] = torch.nan
    arguments = (0.125, False, False, False, None, 0.0, None, lengths, lengths, 70, 70)
    out, lse = emulated.attention_fwd(q, k, v, *arguments)
    for result in (out, *emulated.attention_bwd(torch.ones_like(out), out, lse, q, k, v, *arguments)):
        assert result[:50].isfinite().all() and result[120:153].isfinite().all()
        assert not result[153:].any()
