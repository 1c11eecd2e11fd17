# SPDX-License-Identifier: Apache-2.0
"""Speed of `flash_models.attention` against PyTorch's scaled_dot_product_attention, in the same run.

On CUDA the peers are the FlashAttention-2 and the cuDNN backend, in bfloat16, forward and backward separately, 16,384
tokens a batch and heads * head_dim = 2,048, with 4 B H S^2 D floating-point operations in the forward (half of it when
causal) and 2.5 times as many in the backward. On CPU the peer is PyTorch's own choice, in float32.

--padded: batches with lengths from S / 4 to S, against the mask that Hugging Face passes. --sparse: bands with a global
block, against our own dense kernels and compiled flex_attention, over their density.

Every case is verified before it is timed: the error of the first head, output and gradients, must be at most twice
that of plain PyTorch in the same dtype, both against float32 (CUDA) or float64 (CPU). Inputs are normal random numbers.
A time is the median of many runs, on CUDA with the L2 cache flushed between them; the peers take turns. The backward is
that of a retained graph.

    python eval/bench_attention.py                 # every length, with and without dropout
    python eval/bench_attention.py --quick         # three lengths, no dropout
    python eval/bench_attention.py --sparse
    python eval/bench_attention.py --device cpu

Writes a CSV file and a figure to eval/results/; the last line on stdout is one JSON object.
"""

import argparse
import csv
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from figures import LABELS, draw_attention
from tasks.attention_cases import dense_cases, padded_cases, peers, sparse_cases
from tasks.long_reference import attention_and_gradients

import flash_models
from flash_models.reference import attention_reference

LONGEST_MATRIX = 16384  # tokens: beyond, the score matrix of a head and what autograd keeps of it do not fit


def error_ratio(result, exact, plain):
    """The error of `result` over that of `plain`, plain PyTorch's in the same dtype, with half a rounding allowed."""
    noise = torch.finfo(result.dtype).eps * exact.abs().max()
    return ((result - exact).abs().max() / ((plain - exact).abs().max() + noise / 2)).item()


def verify(case, inputs, dout):
    """Largest error of output and gradients of the first head, as a multiple of plain PyTorch's. Exits if above 2."""
    device = inputs[0].device
    options = case.options(device)
    torch.manual_seed(0)
    out = flash_models.attention(*inputs, **options)
    results = [out, *torch.autograd.grad(out, inputs, dout)]
    torch.manual_seed(0)
    rng_state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)
    first = [t[:1, :, :1] for t in (*inputs, dout)]
    if case.padded:
        options["kv_range"] = options["kv_range"][:1]
    truth, plain = [], []
    for values, dtype in ((truth, torch.float32 if device.type == "cuda" else torch.float64), (plain, out.dtype)):
        if case.seqlen > LONGEST_MATRIX:
            values += attention_and_gradients(*(t.detach() for t in first), options["layout"], dtype)
            continue
        q, k, v, first_dout = (t.detach().to(dtype).requires_grad_() for t in first)
        out, _ = attention_reference(q, k, v, **options, rng_state=rng_state, dtype=dtype)
        values += [out.detach(), *torch.autograd.grad(out, (q, k, v), first_dout)]
    worst = 0.0
    for name, result, exact, other in zip(("out", "dq", "dk", "dv"), results, truth, plain, strict=True):
        ratio = error_ratio(result[:1, :, :1], exact, other)
        if not ratio <= 2:
            sys.exit(f"{case}: the error of {name} is {ratio:.2f} times that of plain PyTorch, more than 2: not timed")
        worst = max(worst, ratio)
    return worst


def gpu_times(fn, count):
    """Milliseconds of so many calls on the GPU. 1 GiB is overwritten before each: that flushes the L2 cache, and takes
    longer than the host needs to queue the call, so that a short one is not timed at the host's pace."""
    scratch = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        scratch.zero_()
        begin.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def some_times(fn, device):
    """Milliseconds of some calls, after a warm-up."""
    if device.type == "cuda":
        once = statistics.median(gpu_times(fn, 5)[2:])
        return gpu_times(fn, min(34, max(4, int(20 / once))))
    times = []
    fn()
    while not times or sum(times) < 170 and len(times) < 10:
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def milliseconds(calls, device):
    """Median time of each of `calls`, functions by name. They take turns, three each, so that what drifts meanwhile, a
    clock or a temperature, does so for all of them.
    """
    times = {name: [] for name in calls}
    for _ in range(3):
        for name, fn in calls.items():
            times[name] += some_times(fn, device)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(case, device):
    """Two rows, forward and backward: ms and TFLOP/s of each peer."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    torch.manual_seed(0)
    *inputs, dout = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    inputs = [t.requires_grad_() for t in inputs]
    error = verify(case, inputs, dout)
    layout = case.layout(device)
    density = 1.0 if layout is None else layout.density
    fields = dict(
        vars(case),
        causal=int(case.causal),
        window="" if case.window is None else case.window,
        density=round(density, 4),
    )
    rows = [dict(fields, direction=direction, error_ratio=round(error, 3)) for direction in ("forward", "backward")]
    forward, backward = {}, {}
    for name, (fn, heads_first) in peers(case, device).items():
        tensors, gradient = inputs, dout
        if heads_first:
            *tensors, gradient = (t.detach().transpose(1, 2).contiguous() for t in (*inputs, dout))
            tensors = [t.requires_grad_() for t in tensors]
        try:
            gradients = partial(torch.autograd.grad, fn(*tensors), tensors, gradient, retain_graph=True)
            gradients()
        except RuntimeError as refusal:
            if name == "flash_models":
                raise
            print(f"{name} does not take {case}: {str(refusal).splitlines()[0]}", file=sys.stderr)
            continue
        forward[name], backward[name] = partial(fn, *tensors), gradients
    for row, calls, flop in zip(rows, (forward, backward), (case.flop(density), 2.5 * case.flop(density)), strict=True):
        for name, ms in milliseconds(calls, device).items():
            row[f"{name}_ms"] = round(ms, 4)
            row[f"{name}_tflops"] = round(flop / ms / 1e9, 4 if device.type == "cpu" else 1)
        for name in LABELS.keys() - {"flash_models"}:
            if f"{name}_ms" in row:
                row[f"speedup_over_{name}"] = round(row[f"{name}_ms"] / row["flash_models_ms"], 3)
    return rows


def _processor():
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def conditions(device):
    def output_of(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = output_of("git", "rev-parse", "--short", "HEAD").strip() or "unknown"
    facts = {"commit": commit + ("+changes" if output_of("git", "status", "--porcelain").strip() else "")}
    facts |= {"flash_models": flash_models.__version__, "torch": torch.__version__}
    if device.type == "cuda":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        facts |= {"gpu": torch.cuda.get_device_name(), "driver": driver[0] if driver else "unknown"}
        facts |= {"cudnn": torch.backends.cudnn.version(), "dtype": "bfloat16"}
    else:
        facts |= {"cpu": _processor(), "threads": torch.get_num_threads()}
        facts |= {"capability": torch.backends.cpu.get_cpu_capability(), "dtype": "float32"}
    return facts


def result_path(benchmark, facts, output_dir, quick=False):
    """The CSV file of a benchmark, named after it, what `conditions` ran on and torch; its folder is made."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    machine = re.sub(r"[^a-z0-9]+", "-", facts.get("gpu", "cpu").lower().removeprefix("nvidia ")).strip("-")
    return output_dir / f"{benchmark}-{machine}-torch{torch.__version__.split('+')[0]}{'-quick' * quick}.csv"


def print_table(rows, header):
    peers = [name for name in LABELS if f"speedup_over_{name}" in rows[0]]
    unit = "TFLOP/s" if rows[0]["flash_models_tflops"] > 5 else "GFLOP/s"
    if header:
        print(f"  D mask   dropout density     S pass      flash-models: ms  {unit}", end="")
        print("".join(f"{LABELS[name]:>26}: ms  ratio" for name in peers))
    for row in rows:
        mask = "causal" if row["causal"] else "full"
        rate = row["flash_models_tflops"] * (1 if unit == "TFLOP/s" else 1e3)
        text = f"{row['head_dim']:>3} {mask:<7}{row['dropout']:>7} {row['density']:>7.3f} {row['seqlen']:>5} "
        text += f"{row['direction']:<9}{row['flash_models_ms']:>17.3f} {rate:>8.1f}"
        text += "".join(f"{row[f'{name}_ms']:>30.3f} {row[f'speedup_over_{name}']:>6.2f}" for name in peers)
        print(text, flush=True)


def write_csv(rows, facts, path):
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        file.write("# " + ", ".join(f"{key} {value}" for key, value in facts.items()) + "\n")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def report_rows(benchmark, rows, facts, output_dir, quick):
    """Write `rows` to the benchmark's CSV file; print them and its path as one JSON line."""
    path = result_path(benchmark, facts, output_dir, quick)
    write_csv(rows, facts, path)
    print(json.dumps({"benchmark": benchmark, **facts, "rows": rows, "csv": str(path)}))


def summary(rows):
    """Geometric mean and minimum of the speed-up over each peer, per dropout and direction."""
    result = {}
    for name in LABELS:
        for row in rows:
            if f"speedup_over_{name}" in row:
                key = f"{row['direction']}_over_{name}" + (f"_dropout_{row['dropout']}" if row["dropout"] else "")
                result.setdefault(key, []).append(row[f"speedup_over_{name}"])
    return {
        key: {"geomean": round(math.exp(statistics.fmean(map(math.log, values))), 3), "min": min(values)}
        for key, values in result.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    suite = parser.add_mutually_exclusive_group()
    suite.add_argument("--padded", action="store_true", help="padded batches instead of full ones")
    suite.add_argument("--sparse", action="store_true", help="block-sparse attention of several densities")
    parser.add_argument("--quick", action="store_true", help="few lengths, no dropout")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="CUDA only (default: 0 and 0.1)")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    device = torch.device(args.device)
    facts = conditions(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = []
    if args.padded:
        cases, suite = padded_cases(device, args.quick), "-padded"
    elif args.sparse:
        cases, suite = sparse_cases(device, args.quick), "-sparse"
    else:
        cases, suite = dense_cases(device, args.quick, args.dropout), ""
    for case in cases:
        rows += measure(case, device)
        print_table(rows[-2:], header=len(rows) == 2)
    path = result_path(f"attention{suite}", facts, args.output_dir, args.quick)
    write_csv(rows, facts, path)
    draw_attention(rows, facts, path.with_suffix(".png"))
    print(json.dumps({"benchmark": "attention", **facts, **summary(rows), "csv": str(path)}))


if __name__ == "__main__":
    main()
