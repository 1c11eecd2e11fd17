#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Pathfinder and Path-X images: do the two round markers lie on the same dashed curve (label 1) or on two (label 0)?

An image is a function of (specification, 64-bit seed, rendering) alone, whatever the number of workers. The presets 32,
64, 128 (Path-X) and 256 follow the "hard" sets of the Long Range Arena (arXiv 2011.04006).

    spec = PathfinderSpec.preset(128)
    sample = generate(spec, split_seed("test", 0))
    images, labels = generate_batch(spec, [split_seed("train", i) for i in range(1000)])
    dataset = PathfinderDataset(spec, "validation", cache_dir="pathfinder_cache")
    easier = dataclasses.replace(spec, size=64, contour_length=6, num_distractors=4, seed_distance=12)

As a script it fills the cache of a `PathfinderDataset` and can draw a preview:

    python eval/tasks/pathfinder.py --size 128 --split test --num_samples 1000 --out cache --preview sheet.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.pathfinder_data import PathfinderDataset, PathfinderStream
from tasks.pathfinder_generate import (
    RENDERINGS,
    SPLITS,
    PathfinderSpec,
    Samples,
    generate,
    generate_batch,
    generate_samples,
    split_seed,
)

__all__ = [
    "RENDERINGS",
    "SPLITS",
    "PathfinderDataset",
    "PathfinderSpec",
    "PathfinderStream",
    "Samples",
    "generate",
    "generate_batch",
    "generate_samples",
    "split_seed",
]


def save_preview(dataset, path, columns=8, rows=4):
    """PNG sheet of the first images, enlarged to at least 128 pixels, framed green (one curve) or red (two)."""
    size = dataset.spec.size
    scale, count = max(1, 128 // size), min(columns * rows, len(dataset))
    cell = size * scale + 6
    sheet = np.zeros((-(-count // columns) * cell, min(count, columns) * cell, 3), np.uint8)
    for n in range(count):
        item = dataset[n]
        tile = sheet[n // columns * cell :, n % columns * cell :][:cell, :cell]
        tile[1:-1, 1:-1] = (40, 160, 60) if item["label"] else (190, 50, 50)
        tile[3:-3, 3:-3] = np.kron(item["image"].numpy(), np.ones((scale, scale), np.uint8))[:, :, None]
    Image.fromarray(sheet).save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Make Pathfinder images (128: Path-X) and keep them in a cache that PathfinderDataset reads.",
        epilog="The last line printed is a JSON object with the folder, the speed and the share of label 1.",
    )
    parser.add_argument("--size", type=int, default=128, help="preset: 32, 64, 128 (Path-X) or 256 [128]")
    parser.add_argument("--split", choices=SPLITS, default="test", help="seeds of splits never overlap [test]")
    parser.add_argument("--num_samples", type=int, help="images [160000, 20000, 20000 for train, validation, test]")
    parser.add_argument("--out", type=Path, required=True, help="folder of caches, the cache_dir of PathfinderDataset")
    parser.add_argument(
        "--rendering",
        choices=RENDERINGS,
        default="lra",
        help="lra: grey levels of the Long Range Arena release; original: those of the published generator [lra]",
    )
    parser.add_argument("--contour_length", type=int, help="dashes of each long curve [the preset's 14]")
    parser.add_argument("--num_distractors", type=int, help="short curves tried [the preset's]")
    parser.add_argument("--base_seed", type=int, default=0, help="another value gives other images for every split [0]")
    parser.add_argument("--num_workers", type=int, help="threads [one per core]")
    parser.add_argument("--with_curves", action="store_true", help="also keep which curve every pixel belongs to")
    parser.add_argument("--preview", type=Path, help="draw the first 32 images on this PNG: green one curve, red two")
    args = parser.parse_args(argv)
    changed = {name: getattr(args, name) for name in ("contour_length", "num_distractors")}
    try:
        spec = PathfinderSpec.preset(args.size)
        spec = dataclasses.replace(spec, **{name: value for name, value in changed.items() if value is not None})
        begun = time.perf_counter()
        dataset = PathfinderDataset(
            spec,
            args.split,
            args.num_samples,
            args.rendering,
            args.out,
            args.with_curves,
            args.num_workers,
            args.base_seed,
        )
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    seconds = time.perf_counter() - begun
    if args.preview:
        save_preview(dataset, args.preview)
    ones = np.mean([dataset[i]["label"] for i in range(len(dataset))])
    result = {"folder": str(dataset.folder), "num_samples": len(dataset), "seconds": round(seconds, 2)}
    print(json.dumps({**result, "label_1": round(ones, 4)}))


if __name__ == "__main__":
    main()
