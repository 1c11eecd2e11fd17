# SPDX-License-Identifier: Apache-2.0
"""Every mistake a caller can make is reported with what was got and what to do."""

import dataclasses

import pytest
import torch

from flash_models import _checks, attention, layouts

pytestmark = pytest.mark.usefixtures("strict")


@pytest.fixture
def q(device):
    return torch.randn(2, 100, 4, 32, device=device, dtype=torch.bfloat16)


@pytest.fixture
def tokens(q):
    """Packed: 100 tokens."""
    return q[0]


def int32(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def fails(error, *words):
    """The message holds every one of `words`."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


@pytest.mark.parametrize("shape", [(100, 32), (100, 4, 32), (1, 2, 100, 4, 32)])
def test_rank(shape, device):
    t = torch.zeros(shape, device=device, dtype=torch.bfloat16)
    with fails(ValueError, str(shape[0]), r"\(batch, sequence, heads, head_dim\)"):
        attention(t, t, t)


def test_rank_packed(q):
    offsets = int32(0, 100, device=q.device)
    with fails(ValueError, r"\(tokens, heads, head_dim\)", "cu_seqlens"):
        attention(q, q, q, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=100, max_seqlen_k=100)


def test_ranks_differ(q):
    with fails(ValueError, "shapes"):
        attention(q, q, q[0])


def test_dtypes_differ(q):
    with fails(TypeError, "bfloat16", "float16", r"\.to\(dtype\)"):
        attention(q, q.half(), q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_dtype(dtype, q):
    t = q.to(dtype)
    with fails(TypeError, str(dtype), "expected bfloat16 or float16"):
        attention(t, t, t)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_float32_on_cuda():
    t = torch.zeros(1, 8, 1, 32, device="cuda")
    with fails(TypeError, "float32", "bfloat16", "scaled_dot_product_attention"):
        attention(t, t, t)


def test_device_without_kernels(monkeypatch):
    t = torch.zeros(1, 8, 1, 32, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(_checks, "_DTYPES", {})
    with fails(NotImplementedError, "on meta", "CPU and CUDA", "scaled_dot_product_attention"):
        attention(t, t, t)


def test_devices_differ(q):
    with fails(ValueError, "meta", r"\.to\(device\)"):
        attention(q, q, q.to("meta"))


@pytest.mark.parametrize("head_dim", [1, 12, 33, 136, 256])
def test_head_dim(head_dim, device):
    t = torch.zeros(1, 8, 2, head_dim, device=device, dtype=torch.bfloat16)
    with fails(ValueError, f"head_dim is {head_dim}", "multiple of 8", "pad"):
        attention(t, t, t)


def test_grouped_queries(q):
    with fails(ValueError, "4 heads", "have 2", "repeat_interleave"):
        attention(q, q[:, :, :2], q[:, :, :2])


def test_heads_first(q):
    turned = q.transpose(1, 2)
    with fails(ValueError, r"\(batch, heads, sequence, head_dim\)"):
        attention(turned[0], turned[0], turned[0], heads_first=True)
    with fails(ValueError, "4 heads", "have 2", r"dim=-3"):
        attention(turned, turned[:, :2], turned[:, :2], heads_first=True)
    strided = turned.transpose(2, 3).contiguous().transpose(2, 3)
    with fails(ValueError, r"strides 1, 100, 1", r"\.contiguous\(\)"):
        attention(turned, strided, turned, heads_first=True)


def test_key_and_value_differ(q):
    with fails(ValueError, "same shape"):
        attention(q, q, q[:, :50])
    with fails(ValueError, "same shape"):
        attention(q, q, q[..., :16])


def test_batch_or_head_dim_differs(q):
    with fails(ValueError, "same batch, heads and head_dim"):
        attention(q, q[:1], q[:1])
    with fails(ValueError, "same batch, heads and head_dim"):
        attention(q, q[..., :16], q[..., :16])


def test_last_dimension_strided(q):
    strided = q.transpose(1, 3).contiguous().transpose(1, 3)
    with fails(ValueError, r"strides 400, 1, 1", r"\.contiguous\(\)"):
        attention(strided, q, q)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_p(dropout_p, q):
    with fails(ValueError, f"dropout_p is {dropout_p}", r"\[0, 1\)"):
        attention(q, q, q, dropout_p=dropout_p)


def packed_attention(tokens, offsets_q, offsets_k=None, max_seqlen_q=100, max_seqlen_k=100, **options):
    return attention(
        tokens,
        tokens,
        tokens,
        cu_seqlens_q=offsets_q,
        cu_seqlens_k=offsets_q if offsets_k is None else offsets_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        **options,
    )


@pytest.mark.parametrize("missing", ["cu_seqlens_q", "cu_seqlens_k"])
def test_one_cu_seqlens(missing, tokens):
    given = "cu_seqlens_k" if missing == "cu_seqlens_q" else "cu_seqlens_q"
    with fails(ValueError, f"{missing} is missing", "both or neither"):
        attention(tokens, tokens, tokens, **{given: int32(0, 100, device=tokens.device)})


def test_cu_seqlens_dtype(tokens):
    with fails(TypeError, "cu_seqlens_q is torch.int64", r"\.int\(\)"):
        packed_attention(tokens, torch.tensor([0, 100], device=tokens.device))


def test_cu_seqlens_shape(tokens):
    with fails(ValueError, "cu_seqlens_q has shape", "number of sequences"):
        packed_attention(tokens, int32([0, 100], device=tokens.device))
    with fails(ValueError, "cu_seqlens_q has shape", "number of sequences"):
        packed_attention(tokens, int32(device=tokens.device))
    with fails(ValueError, r"cu_seqlens_k has shape \(3,\)", r"expected \(2,\)"):
        packed_attention(tokens, int32(0, 100, device=tokens.device), int32(0, 50, 100, device=tokens.device))


def test_cu_seqlens_device(tokens):
    with fails(ValueError, "cu_seqlens_q is on meta", r"\.to\(q\.device\)"):
        packed_attention(tokens, int32(0, 100, device="meta"))


@pytest.mark.parametrize("offsets", [(1, 100), (0, 60, 40, 100), (0, 50, 101), (-1, 100), (0, *range(30, 10, -1))])
def test_cu_seqlens_values(offsets, tokens):
    with fails(ValueError, "cu_seqlens_k is", "start at 0, never decrease", "100 tokens"):
        good = int32(*range(len(offsets)), device=tokens.device)
        packed_attention(tokens, good, int32(*offsets, device=tokens.device))


def test_max_seqlen_missing(tokens, monkeypatch):
    offsets = int32(0, 40, 100, device=tokens.device)
    if tokens.device.type == "cpu":
        expected = packed_attention(tokens, offsets)
        assert torch.equal(packed_attention(tokens, offsets, max_seqlen_q=None, max_seqlen_k=None), expected)
    else:
        monkeypatch.delenv("FLASH_MODELS_STRICT")
        with fails(ValueError, "max_seqlen_k is missing", "int"):
            packed_attention(tokens, offsets, max_seqlen_k=None)


@pytest.mark.parametrize("max_seqlen_q", [59, 0, -1])
def test_max_seqlen_too_small(max_seqlen_q, tokens):
    with fails(ValueError, f"max_seqlen_q is {max_seqlen_q}", "at least", "60"):
        packed_attention(tokens, int32(0, 40, 100, device=tokens.device), max_seqlen_q=max_seqlen_q)


def test_max_seqlen_tensor(tokens):
    with fails(TypeError, "max_seqlen_q is a tensor", r"\.item\(\)"):
        packed_attention(tokens, int32(0, 100, device=tokens.device), max_seqlen_q=torch.tensor(100))


def test_kv_range_form(q):
    good = int32([0, 100], [0, 50], device=q.device)
    with fails(TypeError, "kv_range is torch.int64", r"\.int\(\)"):
        attention(q, q, q, kv_range=good.long())
    with fails(ValueError, r"kv_range has shape \(1, 2\)", r"expected \(2, 2\)"):
        attention(q, q, q, kv_range=good[:1])
    with fails(ValueError, r"kv_range has shape \(2,\)"):
        attention(q, q, q, kv_range=good[0])
    with fails(ValueError, "kv_range is on meta"):
        attention(q, q, q, kv_range=good.to("meta"))


@pytest.mark.parametrize("pair", [[-1, 5], [0, 101], [200, 100]])
def test_kv_range_values(pair, q):
    with fails(ValueError, rf"kv_range\[1\] is \[{pair[0]}, {pair[1]}\]", "from 0 to 100"):
        attention(q, q, q, kv_range=int32([0, 100], pair, device=q.device))


def test_kv_range_values_packed(tokens):
    offsets = int32(0, 40, 100, device=tokens.device)
    with fails(ValueError, r"kv_range\[0\] is \[0, 41\]", "from 0 to 40"):
        packed_attention(tokens, offsets, kv_range=int32([0, 41], [0, 60], device=tokens.device))


def test_layout_length(q):
    with fails(ValueError, "layout has 3 x 3 blocks of 64", "100 queries", "2 x 2"):
        attention(q, q, q, layout=layouts.dense(129, block_size=64, device=q.device))
    with fails(ValueError, "layout has 2 x 1 blocks"):
        attention(q, q, q, layout=layouts.dense(100, 64, block_size=64, device=q.device))


def test_layout_heads(q):
    mask = torch.ones(3, 2, 2, dtype=torch.bool, device=q.device)
    with fails(ValueError, "layout has 3 heads, q has 4"):
        attention(q, q, q, layout=layouts.from_block_mask(mask, 100, 100, 64))


def test_layout_device(q):
    with fails(ValueError, "layout is on meta", "device=q.device"):
        layout = layouts.dense(100, block_size=64)
        lists = {
            field: getattr(layout, field).to("meta") for field in ("row_start", "row_index", "col_start", "col_index")
        }
        attention(q, q, q, layout=dataclasses.replace(layout, **lists))


def test_layout_block_size(q):
    layout = dataclasses.replace(layouts.dense(100, block_size=64, device=q.device), block_size=32)
    with fails(ValueError, "block_size is 32", "64 or 128"):
        attention(q, q, q, layout=layout)


def test_layout_packed_names_the_lengths_to_pass(tokens):
    with fails(ValueError, "2 x 2", "pass max_seqlen_q and max_seqlen_k of the layout"):
        layout = layouts.dense(300, block_size=64, device=tokens.device)
        packed_attention(tokens, int32(0, 100, device=tokens.device), layout=layout)


def test_wrong_values_on_cuda_stay_in_memory(q, monkeypatch):
    """Without the check, nothing outside the tensors is read or written: the result is some finite numbers."""
    if q.device.type != "cuda":
        pytest.skip("on CPU the values are checked")
    monkeypatch.delenv("FLASH_MODELS_STRICT")
    tokens = q[0].clone().requires_grad_()
    far = 2**31 - 1
    for offsets in ((0, far), (-far, far), (50, 10, far, -5), (far, far)):
        kv_range = int32(*[[-far, far]] * (len(offsets) - 1), device=q.device)
        out = packed_attention(tokens, int32(*offsets, device=q.device), kv_range=kv_range, max_seqlen_k=10**6)
        (grad,) = torch.autograd.grad(out.sum(), tokens)
        torch.cuda.synchronize()
        assert out.isfinite().all() and grad.isfinite().all()
