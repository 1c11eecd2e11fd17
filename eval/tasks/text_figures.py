# SPDX-License-Identifier: Apache-2.0
"""Figures of the text scripts: a score against the length, the loss of a training."""

from matplotlib.figure import Figure


def length_label(length):
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)


def draw_by_length(lengths, series, label, path, title=""):
    """Score over length, written to `path`.

    series: {name: (values, intervals or None)}, one value and one [low, high] for each length."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, (values, intervals) in series.items():
        bars = None
        if intervals is not None:
            bars = [
                [abs(value - interval[side]) for value, interval in zip(values, intervals, strict=True)]
                for side in (0, 1)
            ]
        axes.errorbar(lengths, values, bars, marker="o", markersize=4, capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [length_label(length) for length in lengths])
    axes.set(xlabel="length (tokens)", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=150)


def draw_losses(points, path):
    """Loss over steps: points [(step, loss)]."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), linewidth=1)
    axes.set(xlabel="step", ylabel="training loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
