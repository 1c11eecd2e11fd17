# SPDX-License-Identifier: Apache-2.0
"""What a marker's token of a Path-X model has read after each layer, over one connected and one disconnected image.

    python eval/attention_picture.py --model_name_or_path model_cards/pathx-16k-flash

Attention rollout (arXiv 2005.00928): a layer's attention, averaged over the heads, and the residual stream beside it
count half each, and the layers multiply down to the pixels. Writes attention.png into the model's folder, or --output.
"""

import argparse
import io
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image
from tasks.pathfinder import PathfinderSpec, generate_samples, split_seed
from tasks.pathx_model import load_model

from flash_models import attention, hf, images_to_input_ids, layouts


def _through_layer(weights, q, k, scale, layout):
    """weights (N, S) of a layer's output tokens, as weights of its input tokens: block by listed block.

    q, k (S, H, D), already at their positions; the mean over the heads."""
    size, result = layout.block_size, torch.zeros_like(weights)
    place = torch.arange(len(k), device=k.device)
    starts = layout.row_start[0].tolist()
    for row, (first, end) in enumerate(zip(starts, starts[1:], strict=False)):
        rows = slice(row * size, (row + 1) * size)
        keys = torch.cat([place[block * size : (block + 1) * size] for block in layout.row_index[first:end].tolist()])
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * (scale or q.shape[-1] ** -0.5)
        result[:, keys] += weights[:, rows] @ scores.softmax(-1).mean(0)
    return result


@torch.no_grad()
def rollout(model, input_ids, token):
    """What `token` has read after each layer: fp32 (num_layers, S), rows that add up to 1. input_ids (1, S)."""
    calls = []

    def record(q, k, v, *, scale=None, layout=None, **options):  # heads first
        blocks = layouts.dense(q.shape[2], k.shape[2], device=q.device) if layout is None else layout
        calls.append((q[0].transpose(0, 1).float(), k[0].transpose(0, 1).float(), scale, blocks))
        return attention(q, k, v, scale=scale, layout=layout, **options)

    with patch.object(hf, "attention", record):
        model(input_ids=input_ids)
    read = torch.zeros(len(calls), input_ids.shape[1], device=input_ids.device)
    for depth in reversed(range(len(calls))):
        read[depth, token] = 1
        read[depth:] = (read[depth:] + _through_layer(read[depth:], *calls[depth])) / 2
    return read


def read_pixels(model, image, marker):
    """`rollout` of the token at pixel `marker` (y, x) of an image uint8 (S, S), as images: fp32 (num_layers, S, S)."""
    config, side = model.config, image.shape[-1]
    order = layouts.tile_order(side, side, config.image_block_size)
    token = config.num_global_tokens + (order == marker[0] * side + marker[1]).nonzero().item()
    read = rollout(model, images_to_input_ids(image[None], config), token)[:, config.num_global_tokens :]
    pixels = torch.zeros_like(read)
    pixels[:, order] = read
    return pixels.view(-1, side, side)


def draw(model, samples, path, layers):
    """PNG, a row for each sample: the image, a marker ringed, and what its token has read after each of `layers`."""
    count = len(samples.image)
    figure = Figure(figsize=(2.3 * (1 + len(layers)), 2.5 * count), layout="constrained")
    panels = figure.subplots(count, 1 + len(layers), squeeze=False)
    for line, image, label, markers in zip(panels, samples.image, samples.label, samples.markers, strict=True):
        marker = markers[1]  # at the end of a curve
        read = read_pixels(model, torch.from_numpy(image), marker.tolist()).numpy()
        line[0].imshow(image, cmap="gray")
        line[0].set_title(("two curves", "one curve")[label], fontsize=9)
        for axes, layer in zip(line[1:], layers, strict=True):
            shown = axes.imshow(read[layer - 1], cmap="magma", norm=LogNorm(1e-6, 1e-2, clip=True))
            axes.set_title(f"after layer {layer}", fontsize=9)
        for axes in line:
            axes.axis("off")
            axes.add_patch(Circle(marker[::-1], 7, fill=False, color="cyan", linewidth=0.8))
    figure.colorbar(shown, ax=panels[:, -1], shrink=0.8).ax.tick_params(labelsize=7)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)  # half the size, for the card


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True)
    add("--image_size", type=int, choices=(32, 64, 128, 256), default=128)
    add("--rendering", choices=("lra", "original"), default="lra")
    add("--layers", type=int, nargs="+", help="(default: every second)")
    add("--first", type=int, default=0, help="first test image looked at for one of each label")
    add("--output", type=Path, help="PNG file (default: attention.png in the model's folder)")
    args = parser.parse_args(argv)
    model = load_model(args.model_name_or_path).eval()
    seeds = [split_seed("test", args.first + index) for index in range(32)]
    samples = generate_samples(PathfinderSpec.preset(args.image_size), seeds, args.rendering)
    chosen = [int(np.argmax(samples.label == label)) for label in (1, 0)]
    samples = type(samples)(*(part[chosen] for part in samples))
    layers = args.layers or list(range(2, model.config.num_hidden_layers + 1, 2))
    path = args.output or Path(args.model_name_or_path) / "attention.png"
    draw(model, samples, path, layers)
    print(path)


if __name__ == "__main__":
    main()
