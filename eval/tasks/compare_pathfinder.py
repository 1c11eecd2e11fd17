#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compare generated Pathfinder images with images of the published generator in the "lra" rendering.

    python eval/tasks/compare_pathfinder.py --original FOLDER

FOLDER holds original_{32,64,128,256}.npz, each with `images` uint8 (N, size, size). For every size the table shows the
mean over images of some statistics for both sets, and z, their difference in standard errors. The statistics:

* mean: grey level; >0, >40: fraction of pixels above; parts: 8-connected components of the pixels above 40;
* markers: images in which both markers are found, that is, two places where no pixel is darker than our marker template
  and most are equal to it; distance: between their centres, in pixels;
* exact: of the pixels above 40 outside the markers of such images, the fraction covered by dash templates that match
  the image in every pixel above 40, to the grey level. Dashes that touch others do not match, so that our own images
  do not reach 1 either, least of all at 64, where dashes are two pixels apart.

The last line is a JSON object with all of it and the largest difference of the 16-bin histograms.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.pathfinder_generate import PathfinderSpec, generate_batch, prepare, split_seed
from tasks.pathfinder_render import dash_templates, jit, marker_templates

BRIGHT = 40
PEAKS = 12  # the brightest dash of an image, which sets the grey level of all, is nearly always among these
ENOUGH = 0.8  # an exact cover of this much is no chance; further peaks need no try
STATISTICS = ("mean", ">0", ">40", "parts", "markers", "distance", "exact")


@jit
def components(mask):
    """Number of 8-connected components of bool (h, w)."""
    left, stack, count = mask.copy(), [(0, 0)], 0
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            if not left[y, x]:
                continue
            count += 1
            left[y, x] = False
            stack.append((y, x))
            while len(stack) > 1:
                cy, cx = stack.pop()
                for ny in range(max(cy - 1, 0), min(cy + 2, mask.shape[0])):
                    for nx in range(max(cx - 1, 0), min(cx + 2, mask.shape[1])):
                        if left[ny, nx]:
                            left[ny, nx] = False
                            stack.append((ny, nx))
    return count


@jit
def find_markers(image, marker):
    """int64 (2, 2): y, x of the two places most like `marker` (w, w), -1 where there is none."""
    found, best = np.full((2, 2), -1), np.zeros(2)
    reach, cells = marker.shape[0] // 2, (marker > BRIGHT).sum()
    for y in range(reach, image.shape[0] - reach):
        for x in range(reach, image.shape[1] - reach):
            same, fits = 0, True
            for i in range(marker.shape[0]):
                for j in range(marker.shape[0]):
                    if fits and marker[i, j] > BRIGHT:
                        value = image[y + i - reach, x + j - reach]
                        same += value == marker[i, j]
                        fits = value >= marker[i, j]
            if fits and same > max(cells / 2, best[1]):
                last = 0 if same > best[0] else 1
                if last == 0:
                    found[1], best[1] = found[0], best[0]
                found[last, 0], found[last, 1], best[last] = y, x, same
    return found


@jit
def exact_dashes(image, starts, offsets, values):
    """bool (h, w): pixels that belong to a template matching the image. Template t: offsets (n, 2), values (n,) from
    starts[t] to starts[t + 1]."""
    covered = np.zeros(image.shape, np.bool_)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            for t in range(len(starts) - 1):
                fits = True
                for k in range(starts[t], starts[t + 1]):
                    row, column = y + offsets[k, 0], x + offsets[k, 1]
                    inside = 0 <= row < image.shape[0] and 0 <= column < image.shape[1]
                    if not inside or image[row, column] != values[k]:
                        fits = False
                        break
                if fits:
                    for k in range(starts[t], starts[t + 1]):
                        covered[y + offsets[k, 0], x + offsets[k, 1]] = True
    return covered


def grey_templates(spec):
    """What the templates look like in an image whose markers are far from the border: (marker uint8 (w, w), list of
    dashes for `exact_dashes`, one for each of the brightest templates that may be the brightest of an image)."""
    tables = prepare(spec)[0]
    markers = marker_templates(spec.marker_radius, "lra")
    marker = markers[len(markers) // 2, len(markers) // 2].astype(np.float64)
    pixels = np.floor(255 * np.maximum(marker / marker.max(), 0)).astype(np.uint8)
    choices = []
    for stack, half in zip(tables.lines, tables.halves, strict=True):
        dashes = dash_templates([stack], "lra")[1].reshape(-1, 2 * half + 1, 2 * half + 1).astype(np.float64)
        dashes = np.concatenate([dashes * c for c in sorted({spec.target_contrast, spec.distractor_contrast})])
        for peak in np.unique(dashes.max((1, 2)))[-PEAKS:]:
            starts, offsets, values = [0], [], []
            for dash in np.floor(255 * np.clip(dashes / peak / marker.max(), 0, 1)):
                y, x = np.nonzero(dash > BRIGHT)
                order = np.argsort(-dash[y, x])
                offsets.append(np.stack([y - half, x - half], 1)[order])
                values.append(dash[y, x][order])
                starts.append(starts[-1] + len(y))
            choices.append((np.array(starts), np.concatenate(offsets), np.concatenate(values).astype(np.uint8)))
    return pixels, choices[::-1]


def statistics(images, spec):
    """Rows (N, len(STATISTICS)); distance and exact are NaN where the markers were not found."""
    marker, choices = grey_templates(spec)
    rows = []
    for image in images:
        found = find_markers(image, marker)
        distance = exact = np.nan
        if found.min() >= 0:
            distance = np.hypot(*(found[0] - found[1]))
            grid = np.indices(image.shape).transpose(1, 2, 0)
            near = np.abs(grid[:, :, None] - found).max(-1).min(-1) <= marker.shape[0] // 2
            rest = (image > BRIGHT) & ~near
            exact = 0.0
            for dashes in choices:
                exact = max(exact, exact_dashes(image, *dashes)[rest].mean())
                if exact > ENOUGH:
                    break
        bright = image > BRIGHT
        rows.append(
            [image.mean(), (image > 0).mean(), bright.mean(), components(bright), found.min() >= 0, distance, exact]
        )
    return np.array(rows)


def summary(rows):
    """(mean, standard error) over the images, each (len(STATISTICS),)."""
    count = np.isfinite(rows).sum(0)
    return np.nanmean(rows, 0), np.nanstd(rows, 0, ddof=1) / np.sqrt(count)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="folder of original_{32,64,128,256}.npz")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256], help="[32 64 128 256]")
    parser.add_argument("--num_samples", type=int, default=1000, help="own images for each size [1000]")
    args = parser.parse_args(argv)
    result = {}
    print(f"{'':14}{'images':>8}" + "".join(f"{name:>10}" for name in STATISTICS))
    for size in args.sizes:
        spec = PathfinderSpec.preset(size)
        with np.load(args.original / f"original_{size}.npz", allow_pickle=False) as file:
            original = file["images"]
        own, _ = generate_batch(spec, [split_seed("train", i, base_seed=1) for i in range(args.num_samples)])
        sets = {"original": original, "own": own}
        both = {name: summary(statistics(images, spec)) for name, images in sets.items()}
        bins = [np.histogram(images, 16, (0, 256))[0] / images.size for images in sets.values()]
        with np.errstate(invalid="ignore"):
            z = (both["own"][0] - both["original"][0]) / np.hypot(both["own"][1], both["original"][1])
        for name, (mean, _) in both.items():
            print(f"{size:>4} {name:9}{len(sets[name]):8d}" + "".join(f"{value:10.4g}" for value in mean))
        print(f"{size:>4} {'z':17}" + "".join(f"{value:10.2f}" for value in z))
        means = {name: dict(zip(STATISTICS, mean.round(5).tolist(), strict=True)) for name, (mean, _) in both.items()}
        result[size] = {**means, "z": dict(zip(STATISTICS, np.nan_to_num(z).round(2).tolist(), strict=True))}
        result[size]["histogram"] = round(float(np.abs(bins[0] - bins[1]).max()), 5)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
