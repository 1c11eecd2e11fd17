# SPDX-License-Identifier: Apache-2.0
"""One short call of every CUDA kernel instance, for compute-sanitizer (make sanitize):

    compute-sanitizer --tool memcheck  python tests/run_every_kernel.py
    compute-sanitizer --tool racecheck python tests/run_every_kernel.py

Lengths are odd, sequences packed or padded at either end, so that every edge of a tile is met, and tiles that nobody
sees; the last line counts the calls.

    python tests/run_every_kernel.py --repeat 10000

calls those of head dims 64 and 128 in bfloat16 so often, on longer sequences, and compares every bit of outputs and
deterministic gradients with the first call's. Exits with 1 if any differs. The calls are those of a CUDA graph, so that
the GPU and not the host sets the pace.
"""

import argparse
import itertools
import sys

import torch

import flash_models
from flash_models import fused
from flash_models.layouts import local_global

DTYPES = torch.bfloat16, torch.float16


def training_case(head_dim, dtype, dropout_p, block_size, deterministic, packed, times=1):
    """A function that calls forward and backward, of three packed sequences, one empty, or two padded ones, and returns
    results.
    """
    offsets = times * torch.tensor([0, 70, 70, 199], dtype=torch.int32, device="cuda") if packed else None
    longest = times * 129
    kv_range = None if packed else times * torch.tensor([[0, 40], [128, 129]], dtype=torch.int32, device="cuda")
    shape = (int(offsets[-1]), 2, head_dim) if packed else (2, longest, 2, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    dout = torch.randn(shape, device="cuda", dtype=dtype)
    max_seqlen = longest if packed else None
    layout = local_global(longest, 32, 64, block_size=block_size, device="cuda") if block_size else None

    def call():
        out = flash_models.attention(
            q, k, v, causal=block_size == 64, dropout_p=dropout_p, cu_seqlens_q=offsets, cu_seqlens_k=offsets,
            max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, kv_range=kv_range, layout=layout,
            deterministic=deterministic,
        )  # fmt: skip
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    return call


def cached_case(head_dim, dtype, queries, keys):
    """The same for a few queries (decoding, up to four) or more against many keys, forward alone."""
    q = torch.randn(2, queries, 2, head_dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(2, keys, 2, head_dim, device="cuda", dtype=dtype) for _ in range(2))
    return lambda: (flash_models.attention(q, k, v, causal=True),)


def sublayer_case(columns, dtype, approximate, post_norm):
    """The same for what stands between matrix products: norms, GELU and the gradient of logits."""
    x = torch.randn(77, columns, device="cuda", dtype=dtype, requires_grad=True)
    norm, bias = torch.nn.LayerNorm(columns, device="cuda"), torch.randn(columns, device="cuda", requires_grad=True)
    labels = torch.randint(0, columns, (77,), device="cuda")

    def call():
        normal = fused.dropout_add_norm(fused.bias_gelu(x, bias, approximate), bias, x, norm, 0.1, post_norm)[1]
        loss = fused.linear_cross_entropy(fused.layer_norm(normal, norm), norm.weight.diag(), None, labels)
        return torch.autograd.grad(loss, (x, bias, *norm.parameters()))

    return call


def run_all():
    training = itertools.product((32, 64, 96, 128), DTYPES, (0.0, 0.1), (None, 64, 128), (False, True), (True, False))
    cached = itertools.product((32, 64, 80, 128), DTYPES, (1, 3), (70, 1100))
    cached = [*cached, *((128, dtype, 70, 4099) for dtype in DTYPES)]  # from 4,096 keys on it is another instance
    sublayers = itertools.product((64, 2056, 4104), (torch.float32, *DTYPES), ("none", "tanh"), (False, True))
    kinds = (training_case, training), (cached_case, cached), (sublayer_case, sublayers)
    calls = [(make, case) for make, cases in kinds for case in cases]
    for number, (make, case) in enumerate(calls):
        print(f"{number}: {make.__name__}{case}", flush=True)  # what a report that follows is about
        make(*case)()
        torch.cuda.synchronize()
    print(f"{len(calls)} calls")


def repeat(call, times):
    """How many of so many calls, all with the same draws, differ from the first one's results."""
    torch.manual_seed(0)
    first, differing = call(), torch.zeros((), dtype=torch.int64, device="cuda")

    def compare():
        same = [(a.view(torch.int16) == b.view(torch.int16)).all() for a, b in zip(first, call(), strict=True)]
        differing.add_(~torch.stack(same).all())

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # a capture wants everything to have been called before
        compare()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compare()
    differing.zero_()
    for _ in range(times):
        torch.manual_seed(0)
        graph.replay()
    return differing.item()


def repeat_all(times):
    training = itertools.product((64, 128), DTYPES[:1], (0.0, 0.1), (None, 64, 128), (True,), (True, False))
    cached = [*itertools.product((64, 128), DTYPES[:1], (1, 3), (1100,)), (128, DTYPES[0], 70, 4099)]
    cases = [(training_case, (*case, 7)) for case in training] + [(cached_case, case) for case in cached]
    failed = 0
    for make, case in cases:
        differing = repeat(make(*case), times)
        failed += differing > 0
        print(f"{make.__name__}{case}: {differing} of {times} calls differ", flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, metavar="N", help="call N times and compare, instead of once each")
    times = parser.parse_args().repeat
    if times:
        sys.exit(1 if repeat_all(times) else 0)
    run_all()
