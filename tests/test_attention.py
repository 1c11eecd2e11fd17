# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of `attention` against the definition in float64: shapes, dtypes, strides, borders, repetition.

The bound is that of `assert_as_accurate_as`: at most twice the error of plain PyTorch in the kernel's own dtype.
"""

import random

import pytest
import torch
from attention_case import DTYPES, check, gradients, int32, packed, random_layout, random_qkv
from conftest import DEVICES

from flash_models import attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS = [(1, 1), (63, 63), (113, 203), (799, 3), (3, 799), (128, 217), (64, 64), (257, 256), (1023, 1024)]
RANDOM_CASES = {"cpu": 60, "cuda": 200}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("seqlen_q, seqlen_k", LENGTHS, ids=[f"S{q}x{k}" for q, k in LENGTHS])
def test_lengths(seqlen_q, seqlen_k, causal, target):
    check(*random_qkv(seqlen_q, seqlen_k, **target), causal=causal)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 64, 80, 88, 96, 120, 128], ids=lambda d: f"D{d}")
def test_head_dims(head_dim, target):
    q, k, v = random_qkv(113, 203, head_dim=head_dim, heads=3, **target)
    check(q, k, v, causal=head_dim % 16 == 0)


def test_many_heads_and_sequences(one_dtype):
    check(*random_qkv(65, 65, batch=5, heads=7, head_dim=32, **one_dtype), causal=True)


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0, -0.3])
def test_scale(scale, one_dtype):
    check(*random_qkv(70, 90, **one_dtype), scale=scale)


def test_large_scores(one_dtype):
    """Scores near +-1000: the softmax must not overflow, and most rows are one key."""
    q, k, v = random_qkv(130, 200, **one_dtype)
    check(40 * q, 4 * k, v)


@pytest.mark.parametrize("views", ["qkv_in_one", "heads_first", "kv_in_one", "odd_strides"])
def test_strided_views(views, target):

    def randn(*shape):
        return torch.randn(shape, device=target["device"]).to(target["dtype"])

    batch, seqlen, heads, head_dim = 2, 130, 3, 40
    if views == "qkv_in_one":
        q, k, v = randn(batch, seqlen, 3, heads, head_dim).unbind(2)
    elif views == "heads_first":
        q, k, v = (randn(batch, heads, seqlen, head_dim).transpose(1, 2) for _ in range(3))
    elif views == "kv_in_one":
        q = randn(batch, seqlen, heads, head_dim)
        k, v = randn(2, seqlen, batch, heads, head_dim).transpose(1, 2).unbind(0)
    else:  # the rows and the first element sit on no 16-byte boundary
        q, k, v = (randn(batch, seqlen, heads, head_dim + 3)[..., 1:-2] for _ in range(3))
    check(q, k, v, dout=randn(batch, heads, seqlen, head_dim).transpose(1, 2), causal=True)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(63, 65), (1, 130)])
@pytest.mark.parametrize("head_dim", [24, 64, 128], ids=lambda d: f"D{d}")
def test_neighbours_in_memory_are_not_read(seqlen_q, seqlen_k, head_dim, target):
    """The tensors are windows of buffers full of NaN: whatever is read around them shows."""

    def window(t):
        batch, seqlen, heads, head_dim = t.shape
        buffer = t.new_full((batch + 2, seqlen + 130, heads + 2, head_dim + 16), torch.nan)
        view = buffer[1:-1, 1 : seqlen + 1, 1:-1, 8:-8]
        return view.copy_(t)

    q, k, v = random_qkv(seqlen_q, seqlen_k, head_dim=head_dim, **target)
    check(window(q), window(k), window(v), dout=window(torch.randn_like(q)), causal=True)


def test_offsets_beyond_32_bits(one_dtype):
    """Sequences 2**31 elements apart (the memory between them is reserved, on CPU not touched)."""
    device, dtype = one_dtype.values()
    apart = 2**31 + 64
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 3 * apart * dtype.itemsize:
        pytest.skip("not enough GPU memory")
    torch._C._set_deterministic_algorithms(False)  # do not fill it
    buffer = torch.empty(apart + 3 * 70 * 2 * 64, device=device, dtype=dtype)
    q, k, v = (buffer[i * 70 * 128 :].as_strided((2, 70, 2, 64), (apart, 128, 64, 1)) for i in range(3))
    for t in (q, k, v):
        t.normal_()
    check(q, k, v)


@pytest.mark.parametrize("kind", ["sum", "expanded_heads", "last_dim_strided"])
def test_gradient_layouts(kind, one_dtype):
    q, k, v = random_qkv(65, 40, **one_dtype)
    dout = {
        "sum": lambda: torch.ones((), device=q.device, dtype=q.dtype).expand_as(q),
        "expanded_heads": lambda: torch.randn_like(q[:, :, :1]).expand_as(q),
        "last_dim_strided": lambda: torch.randn_like(q).transpose(1, 3).contiguous().transpose(1, 3),
    }[kind]()
    check(q, k, v, dout=dout)


def test_only_some_inputs_need_gradients(one_dtype):
    q, k, v = random_qkv(40, 50, **one_dtype)
    full = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = gradients(attention(*full, deterministic=True), full, torch.ones_like(q))
    for i, tensors in enumerate(([q.clone(), k, v], [q, k.clone(), v], [q, k, v.clone()])):
        tensors[i].requires_grad_()
        (grad,) = gradients(attention(*tensors, deterministic=True), tensors[i : i + 1], torch.ones_like(q))
        torch.testing.assert_close(grad, expected[i])


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 7), (5, 0), (0, 0)])
def test_empty(seqlen_q, seqlen_k, one_dtype):
    check(*random_qkv(seqlen_q, seqlen_k, **one_dtype), causal=True)


def test_empty_batch(one_dtype):
    q, k, v = (t.requires_grad_() for t in random_qkv(5, 7, batch=0, **one_dtype))
    out, lse = attention(q, k, v, causal=True, dropout_p=0.1, return_lse=True)
    assert out.shape == q.shape and lse.shape == (0, 2, 5)
    assert [grad.shape for grad in gradients(out, (q, k, v), torch.zeros_like(out))] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no_sequence", "empty_sequences"])
def test_empty_packed(lengths, one_dtype):
    q, k, v = (t.requires_grad_() for t in random_qkv(0, 0, batch=None, **one_dtype))
    cu_seqlens = packed(lengths, q.device) if lengths else int32([0], q.device)
    out, lse = attention(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=0, max_seqlen_k=0, return_lse=True
    )
    grads = gradients(out, (q, k, v), torch.zeros_like(out))
    assert out.shape == q.shape and lse.shape == (2, 0) and all(grad.shape == q.shape for grad in grads)


def all_features(device, dtype):
    """Packed sequences, one without queries and one without keys, with a layout per head."""
    q_lengths, k_lengths = [300, 0, 190, 64], [300, 33, 257, 0]
    q, k, v = random_qkv(sum(q_lengths), sum(k_lengths), batch=None, device=device, dtype=dtype)
    options = {
        "cu_seqlens_q": packed(q_lengths, device),
        "cu_seqlens_k": packed(k_lengths, device),
        "max_seqlen_q": 300,
        "max_seqlen_k": 300,
        "kv_range": int32([[0, 250], [0, 33], [70, 257], [0, 0]], device),
        "layout": random_layout(300, 300, 64, 2, device, density=0.7),
        "causal": True,
        "dropout_p": 0.2,
    }
    return q, k, v, options


@pytest.mark.parametrize("deterministic", [False, True])
def test_all_features_at_once(deterministic, target):
    q, k, v, options = all_features(**target)
    check(q, k, v, **options, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_bitwise_reproducible(deterministic, target):
    """The output always, the gradients when asked for."""
    q, k, v, options = all_features(**target)
    dense = [t.requires_grad_() for t in random_qkv(500, 500, batch=4, **target)]
    for inputs, kwargs in (((q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), options), (dense, {})):
        dout, first = torch.randn_like(inputs[0]), None
        for _ in range(5):
            torch.manual_seed(1)
            out, lse = attention(*inputs, **kwargs, deterministic=deterministic, return_lse=True)
            results = [out, lse, *(gradients(out, inputs, dout) if deterministic else ())]
            first = first or results
            assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_threads_do_not_matter():
    """To the output, and to gradients when asked for: a head may be one thread's or many's."""
    q, k, v = (t.requires_grad_() for t in random_qkv(300, 333, batch=1, heads=2, device="cpu", dtype=torch.float32))
    dout, threads, results = torch.randn_like(q), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = attention(q, k, v, causal=True, deterministic=True)
            results.append([out, *gradients(out, (q, k, v), dout)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def random_case(rng, device):
    """(q, k, v, options of check), a configuration drawn by `rng`."""
    dtype = rng.choice(DTYPES[device.type])
    heads, head_dim = rng.randint(1, 4), rng.choice([8, 16, 32, 40, 64, 64, 64, 80, 96, 128, 128])
    longest = rng.choice([17, 70, 140, 300, 520])
    batch = rng.randint(1, 4)
    lengths_q = [rng.randint(0 if rng.random() < 0.1 else 1, longest) for _ in range(batch)]
    lengths_k = lengths_q if rng.random() < 0.5 else [rng.randint(1, longest) for _ in range(batch)]
    options = {"causal": rng.random() < 0.5, "deterministic": rng.random() < 0.3, "seed": rng.getrandbits(32)}
    where = {"heads": heads, "head_dim": head_dim, "device": device, "dtype": dtype}
    if rng.random() < 0.4:
        q, k, v = random_qkv(sum(lengths_q), sum(lengths_k), batch=None, **where)
        options |= {"cu_seqlens_q": packed(lengths_q, device), "cu_seqlens_k": packed(lengths_k, device)}
        max_q = options["max_seqlen_q"] = max(lengths_q) + rng.choice([0, 0, 9])
        max_k = options["max_seqlen_k"] = max(lengths_k) + rng.choice([0, 0, 9])
    else:
        lengths_k = [lengths_k[0]] * batch
        max_q, max_k = lengths_q[0], lengths_k[0]
        q, k, v = random_qkv(max_q, max_k, batch=batch, **where)
        if rng.random() < 0.3:
            q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    if rng.random() < 0.3:
        options["dropout_p"] = rng.choice([0.1, 0.35, 0.9])
    if rng.random() < 0.3:
        bounds = [sorted((rng.randint(0, length), rng.randint(0, length))) for length in lengths_k]
        options["kv_range"] = int32(bounds, device)
    if rng.random() < 0.4 and max_q and max_k:
        block_size, layout_heads = rng.choice([64, 128]), rng.choice([1, heads])
        options["layout"] = random_layout(max_q, max_k, block_size, layout_heads, device, rng.choice([0.3, 0.8]))
    if rng.random() < 0.2:
        options["scale"] = rng.choice([0.3, 1.0])
    return q, k, v, options


@pytest.mark.parametrize(
    "device, number", [pytest.param(d, n, id=f"{d}-{n}") for d in DEVICES for n in range(RANDOM_CASES[d])]
)
def test_random_case(device, number):
    torch.manual_seed(number)
    q, k, v, options = random_case(random.Random(number), torch.device(device))
    check(q, k, v, **options)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_an_infinite_gradient_shows(head_dim, one_dtype):
    """A gradient scaler sees the overflow in dk and dv; the other queries and heads keep what is theirs."""
    inputs = [t.requires_grad_() for t in random_qkv(150, 150, head_dim=head_dim, **one_dtype)]
    out = attention(*inputs, causal=True)
    dout = torch.randn_like(out)
    dout[0, 5, 0, 3] = torch.inf
    dq, dk, dv = gradients(out, inputs, dout)
    finite = torch.ones(2, 150, 2, dtype=torch.bool, device=dq.device)
    finite[0, 5, 0] = False
    assert torch.equal(dq.isfinite().all(-1), finite)
    for grad in (dk, dv):
        assert torch.equal(grad.isfinite().all(-1).all(1), finite.all(1))
