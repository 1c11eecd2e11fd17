# SPDX-License-Identifier: Apache-2.0
"""The picture of a block layout."""

import math
import textwrap

import torch

_MAX_PANELS = 12
_MAX_CELLS = 256  # rows and columns that a panel shows apart


def _distinct_heads(dense):
    """{first head: [heads with its pattern]} of a mask of blocks, bool (Hl, nq, nk)."""
    groups = {}
    for head, mask in enumerate(dense):
        same = next((first for first in groups if torch.equal(dense[first], mask)), head)
        groups.setdefault(same, []).append(head)
    return groups


def _ranges(numbers):
    """Ascending numbers in words: "head 3", or "heads 0 to 2, 5"."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a} to {b}" for a, b in runs]
    if len(words) > 4:
        words = [*words[:4], "..."]
    return ("heads " if len(numbers) > 1 else "head ") + ", ".join(words)


def _draw(axes, mask, layout):
    """One pattern, bool (nq, nk); where cells would be too small to see, one stands for any listed block in it."""
    step = math.ceil(max(mask.shape) / _MAX_CELLS)
    cells = torch.nn.functional.max_pool2d(mask[None].float(), step, ceil_mode=True)[0]
    right, bottom = cells.shape[1] * step * layout.block_size, cells.shape[0] * step * layout.block_size
    axes.imshow(cells.numpy(), cmap="Blues", vmin=0, vmax=1.3, extent=(0, right, bottom, 0), interpolation="nearest")
    if max(mask.shape) <= 64:
        axes.set_xticks(range(0, right + 1, layout.block_size), minor=True)
        axes.set_yticks(range(0, bottom + 1, layout.block_size), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    margin = 0.02 * max(layout.seqlen_q, layout.seqlen_k)  # or the frame would hide a first row or column
    axes.set_xlim(-margin, layout.seqlen_k + margin)
    axes.set_ylim(layout.seqlen_q + margin, -margin)
    axes.locator_params(nbins=5)
    axes.tick_params(labelsize=7)


def draw_layout(layout, path):
    """Draw `layout` into the image file `path`: a panel for each pattern that a head has, axes in tokens."""
    from matplotlib.figure import Figure

    dense = layout.to_dense().cpu()
    groups = _distinct_heads(dense)
    shown = list(groups.items())[:_MAX_PANELS]
    columns = min(len(shown), 4)
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(max(3.4 * columns, 5.2), 3.7 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, (head, heads) in zip(panels.flat, shown, strict=False):
        _draw(axes, dense[head], layout)
        if len(groups) > 1:
            name = textwrap.fill(layout.names[head % len(layout.names)], 38)
            axes.set_title(f"{_ranges(heads)}: {dense[head].float().mean():.1%}\n{name}", fontsize=8)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("key (tokens)", fontsize=10)
    figure.supylabel("query (tokens)", fontsize=10)
    title = layout.names[0] if len(groups) == 1 else f"{len(groups)} patterns over {layout.num_heads} heads"
    if len(shown) < len(groups):
        title += f", the first {len(shown)} shown"
    figure.suptitle(f"{title}\ndensity {layout.density:.1%}, block size {layout.block_size} tokens", fontsize=11)
    figure.savefig(path, dpi=150)
