# SPDX-License-Identifier: Apache-2.0
"""Times of a training step for each attention, on the models and at the lengths of the Long Range Arena.

A step is forward, backward, clipping and AdamW in bf16 autocast (float32 on a CPU), on random tokens without padding,
with the dropout of the benchmark. All attentions get the same model, batch, optimizer and options. Tasks may be
timed in several calls: each adds its own to the table.
"""

import csv
import math
import statistics

import torch
from bench_attention import conditions, result_path, write_csv
from bench_pathx import autocast, seconds
from figures import draw_lra
from tasks.document_model import ClassifierLoss
from tasks.lra_model import create_model, new_config
from tasks.lra_tasks import TASKS
from tasks.pathx_model import compile_layers
from tasks.script import peak_memory_mib
from tasks.sdpa_peer import sdpa_instead
from tasks.training_loop import parameter_groups

from flash_models import layouts

QUICK_LENGTH = 256  # tokens, on a CPU


def shape_of(name, args, device):
    """(tokens, examples) of a step."""
    task, on_cpu = TASKS[name], device.type == "cpu"
    batch = args.per_device_train_batch_size or (1 if on_cpu else task.speed_batch_size)
    return QUICK_LENGTH if on_cpu and args.quick else task.speed_length, batch


def random_batch(name, length, batch, device):
    """What ClassifierLoss takes. A pair has two rows."""
    rows = batch * (2 if name == "retrieval" else 1)
    targets = torch.arange(batch, device=device) % 2
    ids = torch.randint(256, (rows, length), device=device)
    return {"input_ids": ids, "targets": targets, "share": 1 / batch}


def build(name, attention, length, args, device):
    torch.manual_seed(0)
    config = new_config(name, attention, ("no", "yes"), length, block_sparse=args.block_sparse)
    return create_model(config).to(device)


@torch.no_grad()
def verify(name, attention, length, args, device):
    """The error of the hidden states of one sequence over that of SDPA under the same mask and in the same dtype, both
    against SDPA in float32 (CUDA) or float64 (CPU). Raises ValueError above 2: what is wrong is not timed."""
    model = build(name, attention, length, args, device).eval()
    ids = random_batch(name, length, 1, device)["input_ids"]
    mask = None
    if model.config.block_sparse:
        mask = layouts.from_config(model.config.block_sparse, length, length, device).token_mask()[0]
    exact = torch.float32 if device.type == "cuda" else torch.float64
    found = []
    with autocast(device):
        found.append(model.bert(ids).last_hidden_state)
    with sdpa_instead(mask):
        with autocast(device):
            found.append(model.bert(ids).last_hidden_state)
        found.append(model.to(exact).bert(ids).last_hidden_state)
    ours, theirs = ((hidden - found[2]).norm().item() for hidden in found[:2])
    if not ours <= 2 * theirs:
        raise ValueError(f"{name}: the error of {attention} is {ours / theirs:.2f} times that of SDPA: not timed")
    return round(ours / theirs, 3)


def training_step(model, batch, device):
    module = ClassifierLoss(model).train()
    optimizer = torch.optim.AdamW(parameter_groups(module, 0.1), lr=1e-4, fused=True)

    def step():
        with autocast(device):
            loss = module(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name, attention, compiled, args, device):
    """A row of the table, or None where the step does not fit into memory."""
    length, batch = shape_of(name, args, device)
    torch.compiler.reset()  # or a layer would be compiled in more variants than torch keeps
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build(name, attention, length, args, device)
    if compiled:
        compile_layers(model)
    try:
        step = training_step(model, random_batch(name, length, batch, device), device)
        once = seconds(step, device, 0.5 if args.quick else 2.0)
    except torch.OutOfMemoryError:
        print(f"{name}, {attention}: a step of {batch} examples does not fit into the memory", flush=True)
        return None
    pattern = model.config.block_sparse
    layout = layouts.from_config(pattern, length, length) if pattern else None
    row = {"task": name, "tokens": length, "batch": batch, "attention": attention, "compiled": int(compiled)}
    row |= {"density": round(layout.density, 4) if layout else 1.0, "ms": round(once * 1e3, 3)}
    row |= {"examples_per_second": round(batch / once, 2), "peak_memory_mib": round(peak_memory_mib(device))}
    text = f"{name:<11}{length:>5} {attention:<13}{'compiled' if compiled else 'eager':<9}{once * 1e3:>10.2f} ms"
    print(f"{text} {row['peak_memory_mib']:>8} MiB", flush=True)
    return row


def add_speedups(rows):
    """How many times as fast as standard attention, compiled or not as the row is."""
    key = lambda row: (row["task"], row["compiled"])  # noqa: E731
    standard = {key(row): row["ms"] for row in rows if row["attention"] == "standard"}
    for row in rows:
        if key(row) in standard:
            row["speedup_over_standard"] = round(standard[key(row)] / row["ms"], 3)


def average(rows):
    """{"eager" or "compiled": {attention: geometric mean of its speed-ups over the tasks, and each}}."""
    means = {}
    for row in rows:
        if "speedup_over_standard" in row:
            of_kind = means.setdefault("compiled" if row["compiled"] else "eager", {})
            of_kind.setdefault(row["attention"], {})[row["task"]] = row["speedup_over_standard"]
    for of_kind in means.values():
        for speedups in of_kind.values():
            speedups["geomean"] = round(math.exp(statistics.fmean(map(math.log, speedups.values()))), 3)
    return means


def earlier_rows(path, facts, tasks):
    """The rows of other tasks in the table that an earlier call under the same conditions wrote."""
    if not path.is_file():
        return []
    conditions_now = "# " + ", ".join(f"{key} {value}" for key, value in facts.items())
    with path.open(newline="") as file:
        # the table itself, once written, is a change to the checkout
        if file.readline().rstrip().replace("+changes", "") != conditions_now.replace("+changes", ""):
            return []
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    words = {"task": str, "attention": str, "tokens": int, "batch": int, "compiled": int, "peak_memory_mib": int}
    rows = [{key: words.get(key, float)(value) for key, value in row.items()} for row in rows]
    return [row for row in rows if row["task"] not in tasks]


def run(args, device):
    """Measure, write CSV and figure into args.output_dir; returns the report."""
    facts = conditions(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    path = result_path("lra", facts, args.output_dir, args.quick)
    rows, errors = earlier_rows(path, facts, args.task), {}
    kinds = [False, True] if args.torch_compile and device.type == "cuda" else [False]
    for name in args.task:
        for attention in args.attention:
            if attention in ("flash", "block_sparse"):
                length, _ = shape_of(name, args, device)
                errors[f"{name}_{attention}"] = verify(name, attention, length, args, device)
            rows += filter(None, (measure(name, attention, compiled, args, device) for compiled in kinds))
        add_speedups(rows)
        write_csv(rows, facts, path)  # after each task, so that a run that is cut short leaves what it has
        draw_lra(rows, facts, path.with_suffix(".png"))
    return {
        "benchmark": "lra",
        **facts,
        "error_ratio": errors,
        "speedup_over_standard": average(rows),
        "csv": str(path),
    }
