# SPDX-License-Identifier: Apache-2.0
"""Speed of attention for few queries against a long KV cache, as a step of generation has it.

Such a step reads K and V once and does little else, so it is measured against the memory: bytes of K and V per second
over those, read and written, of a copy of as many bytes. The peer is PyTorch's scaled_dot_product_attention, its own
choice of backend. Batch 1, 16 heads; bfloat16 on CUDA, with the L2 cache flushed between runs, float32 on a CPU.
Verified before timed, as in bench_attention.py.

    python eval/bench_decode.py
    python eval/bench_decode.py --quick --device cpu

Writes a CSV file to eval/results/; the last line on stdout is one JSON object.
"""

import argparse
import sys
from pathlib import Path

import torch
from bench_attention import conditions, error_ratio, milliseconds, report_rows
from torch.nn.functional import scaled_dot_product_attention

import flash_models
from flash_models.reference import attention_reference

HEADS = 16


def error_of_first_head(q, k, v, out):
    """As a multiple of that of plain PyTorch in the same dtype, both against a wider one."""
    first = [t[:, :, :1] for t in (q, k, v)]
    wide = torch.float32 if q.is_cuda else torch.float64
    exact, _ = attention_reference(*(t.to(wide) for t in first), dtype=wide)
    plain, _ = attention_reference(*first, dtype=q.dtype)
    return error_ratio(out[:, :, :1], exact, plain)


@torch.inference_mode()
def measure(queries, keys, head_dim, device):
    """One row: milliseconds of ours, of SDPA and of the copy, and the share of the copy's bandwidth."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, HEADS, head_dim, device=device).to(dtype) for length in (queries, keys, keys))
    error = error_of_first_head(q, k, v, flash_models.attention(q, k, v))
    if not error <= 2:
        sys.exit(
            f"{queries} queries, {keys} keys: {error:.2f} times the error of plain PyTorch, more than 2: not timed"
        )
    heads_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    source = torch.empty(2, *k.shape, dtype=dtype, device=device)
    target = torch.empty_like(source)
    row = {"head_dim": head_dim, "queries": queries, "keys": keys, "error_ratio": round(error, 3)}
    calls = {
        "flash_models": lambda: flash_models.attention(q, k, v),
        "sdpa": lambda: scaled_dot_product_attention(*heads_first),
        "copy": lambda: target.copy_(source),
    }
    times = milliseconds(calls, device)
    row |= {f"{name}_ms": round(ms, 4) for name, ms in times.items()}
    size = source.nbytes
    row["flash_models_gb_per_s"] = round(size / times["flash_models"] / 1e6, 1)
    row["copy_gb_per_s"] = round(2 * size / times["copy"] / 1e6, 1)
    row["share_of_copy"] = round(times["copy"] / times["flash_models"] / 2, 3)
    row["speedup_over_sdpa"] = round(times["sdpa"] / times["flash_models"], 3)
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one query, short caches")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    facts = conditions(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    lengths = (1024, 4096) if args.quick else (4096, 16384, 65536)
    rows = []
    for head_dim in (64, 128):
        for queries in (1,) if args.quick else (1, 4):
            for keys in lengths:
                rows.append(measure(queries, keys, head_dim, device))
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    report_rows("decode", rows, facts, args.output_dir, args.quick)
    return rows


if __name__ == "__main__":
    main()
