# SPDX-License-Identifier: Apache-2.0
"""Throughput of the Path-X model, one token a pixel, training and inference, against the same model on PyTorch's SDPA.

One set of weights, four attentions, one process: block-sparse and dense on this library's kernels; dense on
scaled_dot_product_attention; and, at 128 x 128 pixels and less, scaled_dot_product_attention with the block mask,
which skips nothing. All else is the same, and as in eval/pathx.py: positions, losses, the optimizer; compiled layers
and bf16 on CUDA, float32 on a CPU.

Before anything is timed, hidden states of one image must be as near to exact ones as SDPA's in the same dtype. A
training step is forward, backward, clipping and AdamW, on random pixels. Times are medians after a warm-up.

    python eval/bench_pathx.py                                                  # 16,448 and 65,600 tokens
    python eval/bench_pathx.py --image_size 256 --batch_size 8 --dense_batch_size 1
    python eval/bench_pathx.py --quick --device cpu

Writes a CSV file and a figure to eval/results/; the last line on stdout is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext as no_context
from pathlib import Path

import torch
from bench_attention import conditions, result_path, write_csv
from figures import draw_pathx
from tasks.pathx_model import PathTracer, compile_layers, create_model, prepare_batch
from tasks.pathx_training import curve_layers
from tasks.script import peak_memory_mib
from tasks.sdpa_peer import sdpa_instead
from tasks.training_loop import parameter_groups

from flash_models import FlashBertForSequenceClassification, layouts

IMPLEMENTATIONS = {  # name: (block-sparse, on SDPA)
    "block_sparse": (True, False),
    "dense": (False, False),
    "sdpa": (False, True),
    "sdpa_masked": (True, True),
}
BATCHES = {128: (32, 8), 256: (8, 1)}  # images a step: block-sparse, dense; 0.3 to 0.6 s a dense step on an H200
LARGEST_MASKED = 128  # pixels a side: beyond, the masks that the backward keeps do not fit


def attention_of(name, config, size, device):
    """Context in which a model computes its attention as the implementation does."""
    sparse, sdpa = IMPLEMENTATIONS[name]
    if not sdpa:
        return no_context()
    tokens = config.num_global_tokens + size * size
    if not sparse:
        return sdpa_instead()
    fields = {"global": config.num_global_tokens, **config.block_sparse}
    return sdpa_instead(layouts.from_config(fields, tokens, tokens, device).token_mask()[0])


def build(name, source, device):
    """`source` with the same weights and dense attention where `name` is dense."""
    config = type(source.config)(**source.config.to_dict())
    if not IMPLEMENTATIONS[name][0]:
        config.block_sparse = None
    model = FlashBertForSequenceClassification(config)
    model.load_state_dict(source.state_dict())
    return model.to(device)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def verify(source, size, device):
    """Errors of the hidden states of one image over those of SDPA in the same dtype, both against SDPA in float32
    (CUDA) or float64 (CPU): {implementation: ratio}. Exits if above 2."""
    torch.manual_seed(1)
    images = torch.randint(256, (1, size, size), dtype=torch.uint8, device=device)
    ids, _ = prepare_batch(images, images, source.config)
    exact = torch.float32 if device.type == "cuda" else torch.float64

    def run(name, dtype=None):
        model = build(name, source, device).eval().to(dtype)
        with attention_of(name, source.config, size, device), autocast(device) if dtype is None else no_context():
            return model.base_model(input_ids=ids).last_hidden_state.to(exact)

    found = {}
    for ours, theirs in (("dense", "sdpa"), ("block_sparse", "sdpa_masked")):
        truth = run(theirs, exact)
        error, allowed = (run(name).sub_(truth).norm().item() for name in (ours, theirs))
        found[ours] = round(error / allowed, 3)
        if not found[ours] <= 2:
            sys.exit(f"{size} x {size}: the error of {ours} is {found[ours]} times that of {theirs}: not timed")
    return found


def training_step(model, batch, size, device):
    tracer = PathTracer(model, curve_layers("half", model.config.num_hidden_layers)).to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(tracer, 0.05), lr=1e-4, betas=(0.9, 0.98), fused=True)
    images, trace = torch.randint(256, (2, batch, size, size), dtype=torch.uint8, device=device)
    labels = torch.arange(batch, device=device) % 2

    def step():
        ids, target = prepare_batch(images, trace % 4, model.config)
        with autocast(device):
            label_loss, curve_loss, _ = tracer(ids, target, labels)
        (label_loss + curve_loss).backward()
        torch.nn.utils.clip_grad_norm_(tracer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference_step(model, batch, size, device):
    model.eval()
    images = torch.randint(256, (batch, size, size), dtype=torch.uint8, device=device)

    @torch.no_grad()
    def step():
        ids, _ = prepare_batch(images, images, model.config)
        with autocast(device):
            return model(input_ids=ids).logits

    return step


def seconds(step, device, budget):
    """Median time of `step`, run for about `budget` seconds, 3 to 30 times, after two runs to warm up."""

    def once():
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    once()
    expected = once()
    return statistics.median(once() for _ in range(min(30, max(3, int(budget / expected)))))


def measure(source, size, name, batch, device, budget):
    """Two rows, training and inference."""
    tokens, rows = source.config.num_global_tokens + size * size, []
    for direction, make in (("training", training_step), ("inference", inference_step)):
        torch.compiler.reset()  # or a layer would be compiled in more variants than torch keeps
        model = build(name, source, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            compile_layers(model)
        fields = {"image_size": size, "tokens": tokens, "pass": direction, "implementation": name, "batch": batch}
        begun = time.perf_counter()
        with attention_of(name, source.config, size, device):
            try:
                once = seconds(make(model, batch, size, device), device, budget)
            except torch.OutOfMemoryError:
                print(f"{name}, {size} x {size}, {direction}: {batch} images do not fit", flush=True)
                continue
        speed = {"ms": round(once * 1e3, 2), "images_per_second": round(batch / once, 3)}
        rows.append({**fields, **speed, "peak_memory_mib": round(peak_memory_mib(device))})
        text = (
            f"{size:>4} {direction:<10}{name:<13}{batch:>3} images {once * 1e3:>9.1f} ms {batch / once:>9.2f} images/s"
        )
        print(f"{text}   ({time.perf_counter() - begun:.0f} s with compilation)", flush=True)
    return rows


def add_speedups(rows):
    """How many times as fast as the dense model on SDPA each is, in images a second."""
    base = {(row["image_size"], row["pass"]): row for row in rows if row["implementation"] == "sdpa"}
    for row in rows:
        if (row["image_size"], row["pass"]) in base:
            speed = base[row["image_size"], row["pass"]]["images_per_second"]
            row["speedup_over_sdpa"] = round(row["images_per_second"] / speed, 3)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--image_size", type=int, nargs="+", help="pixels a side (default: 128 256; on a CPU 64)")
    add("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    add("--batch_size", type=int, help="of block_sparse (default: 32 at 128 pixels, 8 at 256, 1 on a CPU)")
    add("--dense_batch_size", type=int, help="of the others (default: 8 at 128 pixels, 1 at 256)")
    add("--config_name", help="JSON of a FlashBertConfig (default: the model of eval/pathx.py)")
    add("--quick", action="store_true", help="few repetitions, 32 pixels on a CPU")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    facts = conditions(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    small = [32] if args.quick else [64]
    rows, errors = [], {}
    for size in args.image_size or (small if device.type == "cpu" else [128, 256]):
        torch.manual_seed(0)
        source = create_model(size, args.config_name)
        errors[str(size)] = verify(source, size, device)
        for name in args.implementations:
            if name == "sdpa_masked" and size > LARGEST_MASKED:
                continue
            sparse, dense = BATCHES.get(size, (1, 1)) if device.type == "cuda" else (1, 1)
            batch = (args.batch_size or sparse) if name == "block_sparse" else (args.dense_batch_size or dense)
            rows += measure(source, size, name, batch, device, budget=0.5 if args.quick else 2.0)
    add_speedups(rows)
    path = result_path("pathx", facts, args.output_dir, args.quick)
    write_csv(rows, facts, path)
    draw_pathx(rows, facts, path.with_suffix(".png"))
    speedups = {
        f"{row['image_size']}_{row['pass']}_{row['implementation']}": row["speedup_over_sdpa"]
        for row in rows
        if "speedup_over_sdpa" in row
    }
    report = {"benchmark": "pathx", **facts, "error_ratio": errors, "speedup_over_sdpa": speedups}
    print(json.dumps({**report, "csv": str(path)}))


if __name__ == "__main__":
    main()
