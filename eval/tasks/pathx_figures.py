# SPDX-License-Identifier: Apache-2.0
"""Figures of the Path-X and Path-256 scripts: a sheet of hits and misses, the course of a training run."""

import itertools
import json

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle

NAMES = ("disconnected", "connected")


def draw_sheet(images, labels, chances, markers, radius, path, columns=8):
    """PNG with the surest misses above and the surest hits below, markers ringed."""
    chosen = (chances > 0.5).astype(int)
    surest = np.argsort(-np.abs(chances - 0.5), kind="stable")
    misses = [i for i in surest if chosen[i] != labels[i]][: 2 * columns]
    hits = [i for i in surest if chosen[i] == labels[i]][: 4 * columns - len(misses)]
    shown = misses + hits
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2 * columns, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, shown, strict=False):
        right = chosen[i] == labels[i]
        axis.imshow(images[i].numpy(), cmap="gray", vmin=0, vmax=255)
        for y, x in markers[i].tolist():
            axis.add_patch(Circle((x, y), 2 * radius, fill=False, color="cyan"))
        title = f"{'hit' if right else 'MISS'}: {NAMES[labels[i]]}\nsaid {NAMES[chosen[i]]}, P(conn.) {chances[i]:.3f}"
        axis.set_title(title, fontsize=7, color="green" if right else "red")
    figure.suptitle(f"{int((chosen == labels).sum())} of {len(labels)} right; misses first, the surest of each")
    figure.savefig(path, dpi=90)


def plot_log(path):
    """Draw train_log.jsonl (`path`) into training.png beside it: losses above, accuracies below, stages as lines."""
    if not path.is_file():
        return
    records = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [record for record in records if record["event"] == "train"]
    checked = [record for record in records if record["event"] == "validation"]
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, accuracies = figure.subplots(2, 1, sharex=True)
    steps = [record["global_step"] for record in trained]
    reads = "pixel" if trained and "pixel_loss" in trained[0] else "label"
    for axes, keys in ((losses, (f"{reads}_loss", "curve_loss")), (accuracies, (f"{reads}_accuracy", "curve_iou"))):
        for key in keys:
            axes.plot(steps, [record[key] for record in trained], label=key.replace("_", " "), linewidth=1)
    if checked:
        low, high = np.transpose([record["ci95"] for record in checked])
        value = np.array([record["accuracy"] for record in checked])
        bars = np.abs(np.stack((value - low, high - value)))
        at = [record["global_step"] for record in checked]
        accuracies.errorbar(at, value, bars, fmt="ko", ms=3, label="validation")
    for before, after in itertools.pairwise(trained):
        if after["stage"] != before["stage"]:
            losses.axvline(before["global_step"], color="grey", linewidth=0.5)
            accuracies.axvline(before["global_step"], color="grey", linewidth=0.5)
    losses.legend()
    accuracies.legend(loc="upper left")
    accuracies.set_xlabel("step")
    accuracies.set_ylim(0, 1)
    accuracies.axhline(0.5, color="grey", linestyle=":", linewidth=0.5)
    figure.savefig(path.with_name("training.png"), dpi=110)
