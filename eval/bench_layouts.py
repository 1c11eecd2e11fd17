# SPDX-License-Identifier: Apache-2.0
"""What it costs to build a block layout: lists, transposed lists and work items of every pattern, at 65,536 tokens.

Layouts are cached, so a training pays it once for a length; a batch of a new length pays it again. Times are medians
over rounds, in each of which every pattern has its turn: `host` until the last kernel is queued, the other until it is
done. Before that, each layout must list exactly the blocks of the one that is built on a CPU by plain PyTorch.

    python eval/bench_layouts.py
    python eval/bench_layouts.py --device cpu --length 4096

Writes a CSV file to eval/results/; the last line on stdout is one JSON object.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch
from bench_attention import conditions, report_rows
from bench_overhead import interleaved

from flash_models import layouts


def patterns(length):
    """name: a function that builds the layout on a device and in a block size."""
    side = math.isqrt(length)
    return {
        "local_global, window 1024, 128 global tokens": lambda **o: layouts.local_global(length, 1024, 128, **o),
        "bigbird, window 256, 128 global tokens, 3 random": lambda **o: layouts.bigbird(length, 256, 128, 3, **o),
        "strided, stride 2048": lambda **o: layouts.strided(length, 2048, **o),
        "butterfly": lambda **o: layouts.butterfly(length, **o),
        "grid_2d, radius 1": lambda **o: layouts.grid_2d(side, side, 1, **o),
    }


def measure(length, device, rounds):
    """The rows of the table."""
    calls, densities = {}, {}
    for name, build in patterns(length).items():
        for block_size in layouts.BLOCK_SIZES:
            expected, layout = (build(block_size=block_size, device=place) for place in ("cpu", device))
            if not torch.equal(layout.to_dense().cpu(), expected.to_dense()):
                sys.exit(f"{name}, blocks of {block_size}: other blocks on {device} than on a CPU: not timed")
            densities[name, block_size] = layout.density
            calls[name, block_size] = partial(build, block_size=block_size, device=device)
    for key, (done, queued) in interleaved(calls, device, rounds, 10).items():
        yield {
            "pattern": key[0],
            "block_size": key[1],
            "tokens": length,
            "density": round(densities[key], 4),
            "ms": round(done / 1e3, 4),
            "host_ms": round(queued / 1e3, 4),
        }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, default=65536, help="tokens, a square (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each pattern (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    if math.isqrt(args.length) ** 2 != args.length:
        parser.error(f"--length {args.length} is no square, which grid_2d needs; take 4096, 16384 or 65536")
    device = torch.device(args.device)
    facts = conditions(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = list(measure(args.length, device, args.rounds))
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    report_rows("layouts", rows, facts, args.output_dir, quick=False)
    return rows


if __name__ == "__main__":
    main()
