# SPDX-License-Identifier: Apache-2.0
"""Seconds per training step of BERT and GPT-2: transformers against `flash_models.patch(model, fuse=True)`.

The same random weights and batches, transformers' default dropout, bfloat16 autocast (float32 on a CPU) and fused
AdamW for all of them, in one process: transformers' eager and SDPA attention, SDPA under torch.compile, ours dense and
block-sparse, with a window of 256 tokens and 128 global ones, without and with torch.compile. A step is forward,
backward and the optimizer. Padded batches have lengths uniform in S / 4 to S; tokens per second and MFU count real
tokens. MFU is of the GPU's published bfloat16 peak.

On padded batches our BERT computes on real tokens only: with `unpad=True`, and compiled, where nobody can look at a
mask, on the same batches packed into (1, T), as DataCollatorForPackedMaskedLM makes them. T differs from batch to
batch, and one compilation takes them all.

Before a case is timed, the gradients of our model, dropout off, must be as near to those in float32 as transformers'
gradients are, within a factor of 1.5, on two sequences of at most 4,096 tokens. Times are medians of the steps after a
warm-up.

    python eval/bench_training.py --models bert-large --lengths 512 --batch_size 32
    python eval/bench_training.py --max_minutes 9            # again, until nothing is missing: what is there is kept
    accelerate launch --num_processes 2 eval/bench_training.py --models gpt2 --lengths 1024

Writes, after every row, a CSV file and a figure to eval/results/; a variant that runs out of memory is a row that says
so. The last line on stdout is one JSON object.
"""

import argparse
import contextlib
import csv
import gc
import json
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from bench_attention import conditions, result_path, write_csv
from figures import draw_training
from tasks.script import peak_memory_mib
from tasks.training_cases import MODELS, VARIANTS, Case, peak_flops
from tqdm.auto import tqdm

BATCHES = 4  # different ones, taken in turn
WARM_UP = 1 + BATCHES  # steps: torch.compile is done with the first, and every batch has been seen after it
TOLERANCE = 1.5
KEY = ("model", "length", "batch", "padded", "processes", "variant")


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def gradient(case, variant, batch, context):
    """Of all weights, float32 in one vector."""
    model = case.build(variant, batch["input_ids"].device, dropout=False)
    with context:
        loss = model(**batch).loss
    loss.backward()
    return torch.cat([weight.grad.float().flatten() for weight in model.parameters()])


def verify(case, variant, device):
    """The error of our gradients, not compiled, on what `variant` is given, as a multiple of transformers' error, both
    against transformers in float32. Exits if more than TOLERANCE. Block-sparse against SDPA under its mask."""
    few = Case(case.model, min(case.batch, 2), min(case.length, 4096), case.padded)  # all of it in float32 may not fit
    (batch,) = few.batches(1, device)
    variant = variant if VARIANTS[variant].ours else "flash_models"
    stock = few.with_block_mask(batch) if VARIANTS[variant].sparse else batch
    truth = gradient(few, "sdpa", stock, contextlib.nullcontext())
    theirs = gradient(few, "sdpa", stock, autocast(device))
    ours = gradient(few, variant, few.feed(variant, batch), autocast(device))
    noise = 1e-5 * truth.norm()  # on a CPU both are float32
    ratio = ((ours - truth).norm() / ((theirs - truth).norm() + noise)).item()
    if not ratio <= TOLERANCE:
        sys.exit(f"{case}: the error of the gradients is {ratio:.2f} times that of transformers: not timed")
    return round(ratio, 3)


def step_times(step, device, budget):
    """(seconds of the first step, median of the steps after the warm-up), for about `budget` seconds, 5 to 50 steps."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    begun = time.perf_counter()
    step(0)
    wait()
    first = time.perf_counter() - begun
    for number in range(1, WARM_UP):
        step(number)
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    step(0)
    wait()
    count = min(50, max(5, int(budget / (time.perf_counter() - begun))))
    count = broadcast_object_list([count])[0]
    if device.type == "cpu":
        marks = [time.perf_counter()]
        for number in range(count):
            step(number)
            marks.append(time.perf_counter())
        return first, statistics.median(after - before for before, after in zip(marks, marks[1:], strict=False))
    # no wait between the steps: training has none
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for number in range(count):
        step(number)
        events[number + 1].record()
    wait()
    return first, statistics.median(a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False))


def train(case, variant, accelerator, budget):
    """The fields of a row that are measured."""
    device = accelerator.device
    model = case.build(variant, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if accelerator.num_processes > 1:
        model = accelerator.prepare_model(model)
    if VARIANTS[variant].compiled:
        model = torch.compile(model)
    batches = case.batches(BATCHES, device, seed=accelerator.process_index)
    fed, losses = [case.feed(variant, batch) for batch in batches], []

    def step(number):
        with autocast(device):
            loss = model(**fed[number % BATCHES]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    first, seconds = step_times(step, device, budget)
    sums = [sum(count(batch) for batch in batches) / BATCHES for count in (case.tokens, case.flop)]
    tokens, flop = accelerator.reduce(torch.tensor(sums, dtype=torch.float64, device=device), "sum").tolist()
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    counted = peak and not VARIANTS[variant].sparse  # `flop` does not know what a pattern leaves out
    return {
        "ms_per_step": round(seconds * 1e3, 2),
        "tokens_per_second": round(tokens / seconds),
        "mfu": round(flop / seconds / peak / accelerator.num_processes, 4) if counted else "",
        "peak_memory_gib": round(peak_memory_mib(device) / 1024, 2),
        "loss": round(torch.stack(losses[-BATCHES:]).mean().item(), 4),
        "first_step_s": round(first, 1),
    }


def measure(case, variant, accelerator, budget):
    """`train`, or why it could not be: one variant's failure does not lose the others. Then the memory is free."""
    torch.compiler.reset()  # or a layer would be compiled in more forms than torch keeps
    try:
        found = {"status": "ok", **train(case, variant, accelerator, budget)}
    except torch.OutOfMemoryError:
        found = {"status": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        found = {"status": f"failed: {type(error).__name__}"}
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def add_speedups(rows):
    """How many times as fast as each variant of transformers ours are, in the same case."""
    done = {tuple(str(row[key]) for key in KEY): row for row in rows if row["status"] == "ok"}
    for row in rows:
        for peer in ("eager", "sdpa", "sdpa_compile"):
            other = done.get((*(str(row[key]) for key in KEY[:-1]), peer))
            if row["variant"].startswith("flash_models") and row["status"] == "ok" and other:
                row[f"speedup_over_{peer}"] = round(float(other["ms_per_step"]) / float(row["ms_per_step"]), 3)


def kept_rows(path, header, fresh):
    """The rows of an earlier run under the same conditions; what failed there is tried again."""
    if fresh or not path.is_file():
        return []
    with path.open() as file:
        if file.readline().strip() != header:
            sys.exit(f"{path} was measured under other conditions; --fresh replaces it, --output_dir keeps both")
        rows = [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
    return [row for row in rows if not row["status"].startswith("failed")]


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--models", nargs="+", choices=MODELS, help="(default: the four of them on CUDA, the two mini ones on a CPU)")
    add("--lengths", type=int, nargs="+", help="(default: 512 to 16384 on CUDA, 128 on a CPU)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--batch_size", type=int, help="sequences of a process (default: 16,384 tokens, on a CPU 512)")
    add("--padding", choices=["none", "padded", "both"], default="both")
    add("--seconds", type=float, default=3.0, help="of steps that are timed for a row")
    add("--max_minutes", type=float, help="begin no row later than this; the same command goes on with the rest")
    add("--fresh", action="store_true", help="do not keep the rows of an earlier run")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    on_cuda = args.device == "cuda"
    args.models = args.models or [name for name in MODELS if name.endswith("-mini") != on_cuda]
    args.lengths = args.lengths or ([2**power for power in range(9, 15)] if on_cuda else [128])
    return args


def cases(args):
    tokens = 16_384 if args.device == "cuda" else 512
    for model in args.models:
        for length in args.lengths:
            for padded in {"none": [False], "padded": [True], "both": [False, True]}[args.padding]:
                batch = args.batch_size or max(1, tokens // length)
                if not padded or args.padding == "padded" or batch > 1:  # one sequence has nothing to be padded to
                    yield Case(model, batch, length, padded)


def main(argv=None):
    args, started = parse(argv), time.monotonic()
    accelerator = Accelerator(mixed_precision="no", cpu=args.device == "cpu")
    main_process = accelerator.is_main_process
    facts = conditions(accelerator.device)
    header = "# " + ", ".join(f"{key} {value}" for key, value in facts.items())
    path = result_path("training", facts, args.output_dir)
    rows = kept_rows(path, header, args.fresh)
    known = {tuple(str(row[key]) for key in KEY) for row in rows}
    todo = [(case, variant) for case in cases(args) for variant in args.variants]
    errors, left = {}, 0
    bar = tqdm(todo, disable=not main_process, desc="rows")
    for case, variant in bar:
        fields = {"model": case.model, "length": case.length, "batch": case.batch, "padded": int(case.padded)}
        fields |= {"processes": accelerator.num_processes, "variant": variant}
        if tuple(str(fields[key]) for key in KEY) in known:
            continue
        late = args.max_minutes is not None and time.monotonic() - started > 60 * args.max_minutes
        if broadcast_object_list([late])[0]:
            left += 1
            continue
        bar.set_postfix_str(f"{case.model} {case.batch} x {case.length}{' padded' * case.padded} {variant}")
        verified = case, VARIANTS[variant].sparse, case.packs(variant)
        if verified not in errors:
            errors[verified] = verify(case, variant, accelerator.device)
        fields["gradient_error_ratio"] = errors[verified]
        rows.append({**fields, **measure(case, variant, accelerator, args.seconds)})
        add_speedups(rows)
        if main_process:
            bar.write(", ".join(f"{key} {value}" for key, value in rows[-1].items()), file=sys.stdout)
            write_csv(rows, facts, path)
            draw_training(rows, facts, path.with_suffix(".png"))
    if main_process:
        print(json.dumps({"benchmark": "training", **facts, "rows": rows, "rows_left": left, "csv": str(path)}))
    accelerator.end_training()
    if any(row["status"].startswith("failed") for row in rows):
        sys.exit("some variants failed, see above; the same command tries them again")
    return rows


if __name__ == "__main__":
    main()
