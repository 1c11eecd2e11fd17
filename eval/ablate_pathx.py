# SPDX-License-Identifier: Apache-2.0
"""What the Path-X model owes to each of its parts: the same training on small canvases, with one part taken away.

    python eval/ablate_pathx.py --output_dir runs/ablation --max_train_minutes 9

Variants of attention (block-sparse, dense), of positions (2-D, along the sequence of tiles, learned) and of what is
learned from (curves and labels, labels, labels after masked-pixel pretraining on the same images), each by
eval/pathx.py with the same seed, images and steps. The score is that of 2,000 validation images of the last canvas.

The same command again goes on where the last one stopped and leaves out what is done. Writes a table and a JSON file,
pathx-ablation.md and .json, into eval/results/; the last line of stdout is one JSON object.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import pathx
import torch
from tasks.pathx_curriculum import parse_curriculum
from tasks.pathx_model import DEFAULT_CONFIG

CURRICULUM = "48:3:4:400:128,64:5:6:600:64"
DENSE = {"block_sparse": None}
ALONG = {"position_embedding_type": "rotary", "rotary_max_wavelength": 16384.0}
LEARNED = {"position_embedding_type": "absolute"}
LABELS = ("--curve_loss_weight", "0")
VARIANTS = {  # name: (attention, positions, learned from, changes of the config, arguments)
    "sparse_2d": ("block-sparse", "rotary, 2-D", "curves and labels", {}, ()),
    "dense_2d": ("dense", "rotary, 2-D", "curves and labels", DENSE, ()),
    "sparse_1d": ("block-sparse", "rotary, 1-D", "curves and labels", ALONG, ()),
    "dense_1d": ("dense", "rotary, 1-D", "curves and labels", DENSE | ALONG, ()),
    "sparse_learned": ("block-sparse", "learned", "curves and labels", LEARNED, ()),
    "dense_learned": ("dense", "learned", "curves and labels", DENSE | LEARNED, ()),
    "labels": ("block-sparse", "rotary, 2-D", "labels", {}, LABELS),
    "pretrained": ("block-sparse", "rotary, 2-D", "labels, after masked pixels", {}, LABELS),
}


def train(folder, changes, arguments, args, deadline):
    """One run of eval/pathx.py in `folder`, begun or continued. Returns whether it is finished."""
    report = folder / "all_results.json"
    if report.is_file() and json.loads(report.read_text())["training"]["finished"]:
        return True
    if time.monotonic() > deadline:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "ablation_config.json"
    config.write_text(json.dumps({**DEFAULT_CONFIG, **args.config, **changes}))
    options = ["--do_train", "--output_dir", folder, "--config_name", config, "--curriculum", args.curriculum]
    options += ["--seed", args.seed, "--num_validation_samples", args.num_samples, "--num_eval_samples", 0]
    options += ["--logging_steps", min(50, *(stage.steps for stage in parse_curriculum(args.curriculum)))]
    options += ["--eval_steps", 0, "--per_device_eval_batch_size", 64, "--torch_compile"]
    if math.isfinite(deadline):
        options += ["--max_train_minutes", max(1e-6, (deadline - time.monotonic()) / 60)]
    if args.num_workers is not None:
        options += ["--num_workers", args.num_workers]
    if (folder / "checkpoint").is_dir():
        options += ["--resume_from_checkpoint", folder]
    torch.compiler.reset()  # or the layers of all variants together would exceed what torch keeps compiled
    print(f"\n{folder.name}: {' '.join(map(str, [*options, *arguments]))}", flush=True)
    return pathx.main([str(option) for option in (*options, *arguments)])["training"]["finished"]


def run(name, args, deadline):
    """Train a variant and what goes before it. Returns its row of the table, or None where time was up."""
    attention, positions, learned_from, changes, arguments = VARIANTS[name]
    folder, pretraining = args.output_dir / name, args.output_dir / "masked_pixels"
    images = sum(stage.steps * stage.batch_size for stage in parse_curriculum(args.curriculum))
    row = {"variant": name, "attention": attention, "positions": positions, "learned_from": learned_from}
    if name == "pretrained":
        if not train(pretraining, changes, ("--masked_pixels", "0.5"), args, deadline):
            return None
        row["pretraining_images"] = images
        arguments = (*arguments, "--model_name_or_path", pretraining)
    if not train(folder, changes, arguments, args, deadline):
        return None
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    score = next(record for record in reversed(log) if record["event"] == "validation")
    steps = [record for record in log if record["event"] == "train" and record["stage"] == score["stage"]]
    row |= {"images": images, **{key: score[key] for key in ("accuracy", "ci95", "num_samples")}}
    row["label_loss"] = steps[-1]["label_loss"]
    row["curve_iou"] = None if "--curve_loss_weight" in arguments else steps[-1]["curve_iou"]
    row["images_per_second"] = round(statistics.median(step["images_per_second"] for step in steps), 1)
    return row


def table(rows, curriculum):
    lines = ["| attention | positions | learned from | accuracy (95% interval) | IoU of marked curves | images/s |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["ci95"]
        score = f"{100 * row['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
        overlap = "" if row["curve_iou"] is None else f"{row['curve_iou']:.2f}"
        parts = (row["attention"], row["positions"], row["learned_from"], score, overlap)
        lines.append(f"| {' | '.join(parts)} | {row['images_per_second']:,.0f} |")
    first = rows[0]
    facts = f"Curriculum `{curriculum}`, {first['images']:,} images each, scored on {first['num_samples']:,} others"
    facts += ", one seed. Masked pixels are learned from as many images before that. `eval/ablate_pathx.py`."
    return "\n".join([*lines, "", facts, ""])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="where every variant trains, in a folder of its own")
    add("--results_dir", type=Path, default=Path(__file__).parent / "results")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--curriculum", default=CURRICULUM, help="of eval/pathx.py, every stage with its batch size (%(default)s)")
    add("--config", type=json.loads, default={}, help='changes of the model for all, such as {"num_hidden_layers": 4}')
    add("--seed", type=int, default=0)
    add("--num_samples", type=int, default=2000, help="validation images at the end of each stage")
    add("--num_workers", type=int, help="image generator processes")
    add("--max_train_minutes", type=float, default=math.inf, help="of this call, for all variants together")
    args = parser.parse_args(argv)
    if any(stage.batch_size is None for stage in parse_curriculum(args.curriculum)):
        parser.error("--curriculum: give every stage a batch size")
    deadline = time.monotonic() + 60 * args.max_train_minutes
    runs = (run(name, args, deadline) for name in args.variants)
    rows = list(itertools.takewhile(bool, runs))  # the first that was stopped ends it
    report = {"task": "pathx-ablation", "curriculum": args.curriculum, "seed": args.seed, "variants": rows}
    report["missing"] = sorted(set(args.variants) - {row["variant"] for row in rows})
    if rows:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        (args.results_dir / "pathx-ablation.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.results_dir / "pathx-ablation.md").write_text(table(rows, args.curriculum))
        print(table(rows, args.curriculum))
    print(json.dumps(report), flush=True)
    return report


if __name__ == "__main__":
    main()
