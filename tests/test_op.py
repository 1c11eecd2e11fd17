# SPDX-License-Identifier: Apache-2.0
"""The op as PyTorch's machinery sees it: schema, fake tensors, autograd, compilers, graphs, checkpointing."""

import pytest
import torch
from attention_case import int32
from conftest import DEVICES
from torch.utils.checkpoint import checkpoint

from flash_models import attention, layouts, ops

needs_cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")


def leaves(device, shape=(2, 130, 2, 32), count=3):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(count)]


# What a call of `attention` may look like, beside q, k, v.
OPTIONS = {
    "plain": lambda device: {},
    "causal": lambda device: {"causal": True},
    "kv_range": lambda device: {"kv_range": int32([[0, 90], [20, 130]], device)},
    "layout": lambda device: {"layout": layouts.local(130, 40, block_size=64, device=device)},
    "dropout": lambda device: {"dropout_p": 0.2},
}
PACKED = {"cu_seqlens": [0, 100, 260], "max_seqlen": 160}


@pytest.fixture(params=OPTIONS)
def options(request, device):
    return {**OPTIONS[request.param](device), "deterministic": True}


def packed_options(device):
    offsets, longest = int32(PACKED["cu_seqlens"], device), PACKED["max_seqlen"]
    return {
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "deterministic": True,
    }


def call_with_gradients(fn, tensors, seed=0):
    torch.manual_seed(seed)
    out = fn(*tensors)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


def assert_all_close(results, expected):
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value)


def op_arguments(tensors, options):
    """What `attention` passes to the op: positional arguments and a dict of others."""
    passed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_autograd", lambda *args, **others: passed.append((args, others)) or (None, None))
        attention(*tensors, **options)
    return passed[0]


def check_ops(tensors, options):
    args, others = op_arguments(tensors, options)
    torch.library.opcheck(ops.attention_fwd, args, others, atol=2e-2, rtol=2e-2)
    with torch.no_grad():
        out, lse = ops.attention_fwd(*args, **others)
        args = (torch.randn_like(out), out, lse, *(t.detach() for t in args[:3]), *args[3:])
        torch.library.opcheck(ops.attention_bwd, args, others, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck(packed, options, device):
    if packed:
        tensors = leaves(device, (260, 2, 32))
        options = {**options, **packed_options(device)}
        if "layout" in options:
            options["layout"] = layouts.local(160, 40, block_size=64, device=device)
        if "kv_range" in options:
            options["kv_range"] = int32([[0, 90], [20, 130]], device)
    else:
        tensors = leaves(device)
    check_ops(tensors, options)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_heads_first(packed, options, device):
    """Heads before tokens: the same results, in the same memory."""
    tensors, options = (leaves(device, (260, 2, 32)), packed_options(device)) if packed else (leaves(device), options)
    turned = [t.detach().transpose(-3, -2).requires_grad_() for t in tensors]
    expected = call_with_gradients(lambda *t: attention(*t, **options), tensors)
    out, *gradients = call_with_gradients(lambda *t: attention(*t, heads_first=True, **options), turned)
    for result, value in zip([out, *(t.transpose(-3, -2) for t in gradients)], expected, strict=True):
        assert torch.equal(result, value) and result.is_contiguous()
    check_ops(turned, {**options, "heads_first": True})


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic, options, device):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, **options) * 2, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    tensors = leaves(device)
    assert_all_close(
        call_with_gradients(compiled, tensors), call_with_gradients(lambda *t: attention(*t, **options) * 2, tensors)
    )


def test_compile_packed(device):
    torch.compiler.reset()
    options = packed_options(device)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, **options), fullgraph=True, backend="aot_eager")
    tensors = leaves(device, (260, 2, 32))
    assert_all_close(
        call_with_gradients(compiled, tensors), call_with_gradients(lambda *t: attention(*t, **options), tensors)
    )


def test_compile_inductor(device):
    """The whole compiler, between operations that it fuses and with the views of a packed projection."""
    torch.compiler.reset()

    def block(x, weight):
        q, k, v = (0.2 * x @ weight).view(2, 70, 3, 2, 16).unbind(2)
        return attention(q, k, v, causal=True).reshape(2, 70, 32).relu()

    tensors = leaves(device, (2, 70, 32), 1) + leaves(device, (32, 96), 1)
    results = call_with_gradients(torch.compile(block, fullgraph=True), tensors)
    for result, expected in zip(results, call_with_gradients(block, tensors), strict=True):
        torch.testing.assert_close(
            result, expected, rtol=2e-2 if device.type == "cuda" else 1e-4, atol=2e-1 if device.type == "cuda" else 1e-4
        )


def test_export(options, device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, **options)

    tensors = [t.detach() for t in leaves(device)]
    program = torch.export.export(Module(), tuple(tensors))
    torch.manual_seed(0)
    result = program.module()(*tensors)
    torch.manual_seed(0)
    torch.testing.assert_close(result, attention(*tensors, **options))


def test_export_with_dynamic_lengths(device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True)

    batch, seqlen = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("seqlen", min=2, max=4096)
    tensors = [t.detach() for t in leaves(device)]
    program = torch.export.export(Module(), tuple(tensors), dynamic_shapes=[{0: batch, 1: seqlen}] * 3)
    longer = [t.detach() for t in leaves(device, (3, 201, 2, 32))]
    torch.testing.assert_close(program.module()(*longer), attention(*longer, causal=True))


def test_meta_device():
    """Shapes without data: for counting, and for models built on the meta device."""
    q, k, v = (torch.empty(2, 50, 3, 16, device="meta", requires_grad=True) for _ in range(3))
    out, lse = attention(q, k, v, dropout_p=0.1, return_lse=True)
    assert out.shape == q.shape and lse.shape == (2, 3, 50) and lse.dtype == torch.float32
    (grad,) = torch.autograd.grad(out.sum(), (k,))
    assert grad.is_meta and grad.shape == k.shape


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout(use_reentrant, device):
    tensors = leaves(device)

    def block(q, k, v):
        return attention(q, k, v, dropout_p=0.3, deterministic=True)

    expected = call_with_gradients(block, tensors)
    torch.manual_seed(0)
    out = checkpoint(block, *tensors, use_reentrant=use_reentrant)
    out.square().sum().backward()
    assert_all_close([out, *(t.grad for t in tensors)], expected)


def test_dropout_follows_the_seed(device):
    tensors = leaves(device)
    torch.manual_seed(5)
    first, second = (attention(*tensors, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, attention(*tensors, dropout_p=0.5))
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    attention(*tensors)
    assert torch.equal(state, torch.get_rng_state()), "without dropout nothing is drawn"


def test_lse_has_no_gradient(device):
    out, lse = attention(*leaves(device), return_lse=True)
    assert out.requires_grad and not lse.requires_grad


def test_no_gradient_arrives(device):
    """What comes after attention may give its input no gradient; then the inputs of attention have none either."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    tensors = leaves(device)
    (Stop.apply(attention(*tensors)).sum() + tensors[0].sum()).backward()
    assert (tensors[0].grad == 1).all() and tensors[1].grad is None and tensors[2].grad is None


def test_second_derivative_is_refused(device):
    tensors = leaves(device)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(attention(*tensors).sum(), tensors, create_graph=True)


def test_inference_mode(device):
    tensors = leaves(device)
    with torch.inference_mode():
        out = attention(*tensors)
    assert torch.equal(out, attention(*tensors).detach())


def test_autocast_casts_as_sdpa_does(device):
    tensors = [t.detach().float().requires_grad_() for t in leaves(device)]
    half = [t.detach().bfloat16() for t in tensors]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for fn in (attention, compiled):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = fn(tensors[0], tensors[1], half[2])
        assert out.dtype == torch.bfloat16 and torch.equal(out, attention(*half))
        (grad,) = torch.autograd.grad(out.sum(), tensors[:1])
        assert grad.dtype == torch.float32


def test_deterministic_mode_of_torch(device, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    args, _ = op_arguments(leaves(device), {})
    names = [argument.name for argument in ops.attention_fwd._schema.arguments]
    assert args[names.index("deterministic")] is True


def test_cuda_graph(device, options):
    """Captured once, replayed on new inputs; each replay draws new dropout."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    static, new = leaves(device), leaves(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call_with_gradients(lambda *t: attention(*t, **options), static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*static, **options)
        results = [out, *torch.autograd.grad(out.square().sum(), static)]
    with torch.no_grad():
        for t, source in zip(static, new, strict=True):
            t.copy_(source)
    graph.replay()
    first = [result.clone() for result in results]
    graph.replay()
    if options.get("dropout_p"):
        assert not torch.equal(first[0], results[0])
    else:
        torch.testing.assert_close(results[0], first[0], rtol=0, atol=0)
        expected = call_with_gradients(lambda *t: attention(*t, **options), new)
        for result, value in zip(first, expected, strict=True):
            torch.testing.assert_close(result, value, rtol=2e-2, atol=2e-2)


@needs_cuda
def test_side_stream_and_other_device():
    """The kernel runs on the current stream and on the device of its inputs."""
    tensors = leaves(torch.device("cuda"), (4, 2000, 4, 64))
    expected = attention(*tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = [t.detach().clone() for t in tensors]
        out = attention(*late)
    stream.synchronize()
    assert torch.equal(out, expected)
    if torch.cuda.device_count() > 1:
        moved = [t.detach().to("cuda:1") for t in tensors]
        assert torch.equal(attention(*moved).cpu(), expected.cpu())
