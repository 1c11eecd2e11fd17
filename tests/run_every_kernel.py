# SPDX-License-Identifier: Apache-2.0
"""One short call of every CUDA kernel instance, for compute-sanitizer (make sanitize):

    compute-sanitizer --tool memcheck  python tests/run_every_kernel.py
    compute-sanitizer --tool racecheck python tests/run_every_kernel.py

Lengths are odd and sequences packed, so that every edge of a tile is met; the last line counts the calls.
"""

import itertools

import torch

import flash_models
from flash_models.layouts import local_global


def main():
    calls = 0
    offsets = torch.tensor([0, 70, 70, 199], dtype=torch.int32, device="cuda")
    for head_dim, dtype, dropout_p, block_size, deterministic in itertools.product(
        (32, 64, 96, 128), (torch.bfloat16, torch.float16), (0.0, 0.1), (None, 64, 128), (False, True)
    ):
        q, k, v = (torch.randn(199, 2, head_dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
        layout = local_global(129, 32, 64, block_size=block_size, device="cuda") if block_size else None
        out = flash_models.attention(
            q,
            k,
            v,
            causal=block_size == 64,
            dropout_p=dropout_p,
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=129,
            max_seqlen_k=129,
            layout=layout,
            deterministic=deterministic,
        )
        out.backward(torch.randn_like(out))
        calls += 1
    for head_dim, dtype, queries, keys in itertools.product(
        (32, 64, 80, 128), (torch.bfloat16, torch.float16), (1, 3), (70, 1100)
    ):
        q = torch.randn(2, queries, 2, head_dim, device="cuda", dtype=dtype)
        k, v = (torch.randn(2, keys, 2, head_dim, device="cuda", dtype=dtype) for _ in range(2))
        flash_models.attention(q, k, v, causal=True)
        calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
