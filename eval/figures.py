# SPDX-License-Identifier: Apache-2.0
"""Figures of the benchmarks, drawn from the rows that they measured."""

from matplotlib.figure import Figure

LABELS = {
    "flash_models": "flash-models",
    "cudnn": "cuDNN (SDPA)",
    "fa2": "FlashAttention-2 (SDPA)",
    "sdpa": "PyTorch SDPA",
    "dense": "flash-models, dense",
    "flex": "flex_attention (compiled)",
}
COLORS = {
    "flash_models": "#d1495b",
    "cudnn": "#2e4057",
    "fa2": "#8d96a3",
    "sdpa": "#8d96a3",
    "dense": "#d1a5b0",
    "flex": "#2e4057",
}


def _select(rows, **values):
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def draw_attention(rows, facts, path):
    """Speed over length: a line of panels for each (dropout, pass), a column for each (head_dim, mask).

    rows: dicts with the columns of bench_attention.py. Block-sparse rows, which have a `window`, get columns of their
    own, one for each shape: time over density. `facts`: the conditions, printed above. Written to `path`, a PNG file.
    """
    lines = sorted({(row["dropout"], row["direction"]) for row in rows}, key=lambda line: (line[0], line[1][0] != "f"))
    dense = sorted({(row["head_dim"], row["causal"]) for row in rows if row["window"] == ""})
    sparse = sorted({(row["seqlen"], row["head_dim"], row["causal"]) for row in rows if row["window"] != ""})
    width = len(dense) + len(sparse)
    figure = Figure(figsize=(3.3 * width, 2.6 * len(lines) + 0.7), layout="constrained")
    panels = figure.subplots(len(lines), width, squeeze=False)
    for line, (dropout, direction) in zip(panels, lines, strict=True):
        for axes, (head_dim, causal) in zip(line, dense, strict=False):
            chosen = _select(rows, dropout=dropout, direction=direction, head_dim=head_dim, causal=causal, window="")
            _draw_speed(axes, chosen)
            title = f"{direction}, D {head_dim}, {'causal' if causal else 'full'}"
            axes.set_title(title + (f", dropout {dropout}" if dropout else ""), fontsize=9)
        for axes, (seqlen, head_dim, causal) in zip(line[len(dense) :], sparse, strict=True):
            shape = {"seqlen": seqlen, "head_dim": head_dim, "causal": causal}
            _draw_density(axes, _select(rows, dropout=dropout, direction=direction, **shape))
            axes.set_title(f"{direction}, S {seqlen}, block-sparse", fontsize=9)
        if dense:
            line[0].set_ylabel("TFLOP/s")
    for axes in panels[-1][: len(dense)]:
        axes.set_xlabel("sequence length (tokens)")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(", ".join(f"{key} {value}" for key, value in facts.items()), fontsize=8, wrap=True)
    figure.savefig(path, dpi=150)


def _draw_speed(axes, rows):
    for name, label in LABELS.items():
        points = [(row["seqlen"], row[f"{name}_tflops"]) for row in rows if f"{name}_tflops" in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLORS[name], label=label)
    axes.set_xscale("log", base=2)
    lengths = sorted({row["seqlen"] for row in rows})
    axes.set_xticks(lengths, [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_density(axes, rows):
    for name, label in LABELS.items():
        points = sorted((row["density"], row[f"{name}_ms"]) for row in rows if f"{name}_ms" in row)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLORS[name], label=label)
    axes.set(xscale="log", yscale="log", xlabel="density of the block layout", ylabel="milliseconds")
    densities = sorted({row["density"] for row in rows})
    axes.set_xticks(densities, [f"{density:.2g}" for density in densities], rotation=45, fontsize=7)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw_pathx(rows, facts, path):
    """Images a second of each implementation, a panel for each (size, pass). rows: those of bench_pathx.py."""
    panels = list(dict.fromkeys((row["image_size"], row["pass"]) for row in rows))
    labels = {**LABELS, "block_sparse": "flash-models, block-sparse", "sdpa_masked": "PyTorch SDPA, block mask"}
    colors = {**COLORS, "block_sparse": COLORS["flash_models"], "sdpa_masked": COLORS["flex"]}
    figure = Figure(figsize=(3.6 * len(panels), 2.8), layout="constrained")
    for axes, (size, direction) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        chosen = _select(rows, image_size=size, **{"pass": direction})[::-1]
        names = [row["implementation"] for row in chosen]
        bars = axes.barh(
            [labels[name] for name in names],
            [row["images_per_second"] for row in chosen],
            color=[colors[name] for name in names],
        )
        axes.bar_label(bars, [f" {row['images_per_second']:.3g}" for row in chosen], fontsize=7)
        axes.margins(x=0.15)
        axes.tick_params(labelsize=7)
        axes.set_title(f"{direction}, {size} x {size}, {chosen[0]['tokens']:,} tokens", fontsize=9)
        axes.set_xlabel("images/s", fontsize=8)
    figure.suptitle(", ".join(f"{key} {value}" for key, value in facts.items()), fontsize=7, wrap=True)
    figure.savefig(path, dpi=130)


def draw_lra(rows, facts, path):
    """Speed-up of a training step over standard attention: a panel without and one with torch.compile, a group of bars
    for each task. rows: those of lra.py --speed; where standard attention was not timed, nothing is drawn."""
    rows = [row for row in rows if row.get("speedup_over_standard")]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["attention"] for row in rows))
    kinds = sorted({row["compiled"] for row in rows})
    labels = {"flash": "flash-models", "block_sparse": "flash-models, block-sparse", "sdpa": "PyTorch SDPA"}
    colors = {"flash": COLORS["flash_models"], "block_sparse": "#7a2230", "sdpa": COLORS["sdpa"], "standard": "#c9cdd2"}
    colors |= {"linformer": "#2e4057", "performer": "#66a182"}
    figure = Figure(figsize=(7, 2.8 * max(1, len(kinds)) + 0.4), layout="constrained")
    for axes, compiled in zip(figure.subplots(max(1, len(kinds)), 1, squeeze=False)[:, 0], kinds, strict=False):
        for place, name in enumerate(names):
            chosen = {
                row["task"]: row["speedup_over_standard"] for row in _select(rows, attention=name, compiled=compiled)
            }
            at = [number + (place - (len(names) - 1) / 2) * 0.8 / len(names) for number in range(len(tasks))]
            heights = [chosen.get(task, 0) for task in tasks]
            bars = axes.bar(at, heights, 0.8 / len(names), color=colors[name], label=labels.get(name, name))
            axes.bar_label(bars, [f"{height:.1f}" if height else "" for height in heights], fontsize=5)
        lengths = {row["task"]: row["tokens"] for row in rows}
        axes.set_xticks(range(len(tasks)), [f"{task}\n{lengths[task]:,} tokens" for task in tasks], fontsize=7)
        axes.set_ylabel("times standard attention", fontsize=8)
        axes.set_title("training step" + (", torch.compile" if compiled else ""), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3, axis="y")
    if kinds:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=7, ncols=3)
    figure.suptitle(", ".join(f"{key} {value}" for key, value in facts.items()), fontsize=6, wrap=True)
    figure.savefig(path, dpi=150)


def draw_training(rows, facts, path):
    """Tokens a second over the length, a panel for each (model, padding, processes). rows: those of
    bench_training.py."""
    rows = [row for row in rows if row["status"] == "ok"]
    panels = sorted({(row["model"], str(row["padded"]), str(row["processes"])) for row in rows})
    if not panels:
        return
    labels = {"eager": "transformers, eager", "sdpa": "SDPA", "sdpa_compile": "SDPA, torch.compile"}
    labels |= {"flash_models": "flash-models, fused", "flash_models_compile": "flash-models, fused, torch.compile"}
    labels |= {"flash_models_sparse": "flash-models, fused, block-sparse"}
    labels |= {"flash_models_sparse_compile": "flash-models, fused, block-sparse, torch.compile"}
    colors = {"eager": "#c9ccd1", "sdpa": "#8d96a3", "sdpa_compile": "#2e4057"}
    colors |= {"flash_models": "#d1495b", "flash_models_compile": "#edae49", "flash_models_sparse": "#00798c"}
    colors |= {"flash_models_sparse_compile": "#66a182"}
    figure = Figure(figsize=(max(3.3 * len(panels), 5), 3.4), layout="constrained")
    for axes, (model, padded, processes) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        mine = [row for row in rows if (row["model"], str(row["padded"]), str(row["processes"]))
                == (model, padded, processes)]  # fmt: skip
        for name, label in labels.items():
            points = sorted(
                (int(row["length"]), float(row["tokens_per_second"])) for row in mine if row["variant"] == name
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colors[name], label=label)
        lengths = sorted({int(row["length"]) for row in mine})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        title = model + (", padded" if padded == "1" else "")
        axes.set_title(title + (f", {processes} processes" if processes != "1" else ""), fontsize=9)
        axes.set_xlabel("sequence length (tokens)", fontsize=8)
    figure.axes[0].set_ylabel("tokens/s")
    known = {}  # each label once, wherever it occurs
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        known |= dict(zip(names, handles, strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=3, fontsize=7)
    figure.suptitle(", ".join(f"{key} {value}" for key, value in facts.items()), fontsize=7, wrap=True)
    figure.savefig(path, dpi=130)


def draw_loss_curves(curves, window, facts, path):
    """Smoothed losses over steps, and below each one's difference from the first. curves: {name: array}, whose first
    point is at step `window`."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    first = next(iter(curves.values()))
    steps = range(window, window + len(first))
    for number, (name, losses) in enumerate(curves.items()):
        style = {"color": ("#2e4057", "#d1495b", "#8d96a3")[number % 3], "linewidth": 1.2}
        above.plot(steps, losses, label=name.replace("_", " "), linestyle="--" if number == 1 else "-", **style)
        if number:
            below.plot(steps, losses - first, **style)
    above.set_ylabel(f"training loss, mean of {window} steps")
    below.set(xlabel="step", ylabel="difference")
    above.legend(fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.suptitle(", ".join(f"{key} {value}" for key, value in facts.items()), fontsize=7, wrap=True)
    figure.savefig(path, dpi=130)
