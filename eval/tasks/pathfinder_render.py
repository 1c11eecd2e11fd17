# SPDX-License-Identifier: Apache-2.0
"""How Pathfinder images are drawn: templates of dashes and markers, and the compiled compositing.

Lines and disks are drawn on a canvas twice as fine and resampled with LANCZOS by Pillow, as the generator of Linsley et
al. 2018 (github.com/drewlinsley/pathfinder) does. Two renderings:

* "original": the published generator. Resampled in uint8 (rounded, clipped), saved with the brightest pixel at 255.
* "lra": the images of the Long Range Arena release. Resampled in float without clipping, the dashes divided by their
  brightest pixel, ``floor(255 F / max F)`` at the end. Overshoot of the markers then sets the scale of the image.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from PIL import Image, ImageDraw

SCALE = 2  # the drawing canvas is this much finer
CURVE_LEVEL = 0.2  # a pixel belongs to a curve from this fraction of the brightest dash pixel on


def jit(function):
    """Compile without the GIL, and keep the machine code on disk where numba can write it."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no writable cache folder: every process compiles for itself
        return njit(nogil=True)(function)


def disk(radius):
    """Integer offsets (n, 2) with y^2 + x^2 <= radius^2."""
    reach = np.arange(-int(radius), int(radius) + 1)
    y, x = np.meshgrid(reach, reach, indexing="ij")
    keep = y * y + x * x <= radius * radius
    return np.stack([y[keep], x[keep]], 1)


def dilate(stack, radius):
    """Maximum over a disk for each image of `stack` (n, h, w); what lies outside counts as nothing."""
    padded = np.pad(stack, ((0, 0), (radius, radius), (radius, radius)))
    out = np.zeros_like(stack)
    for y, x in disk(radius) + radius:
        np.maximum(out, padded[:, y : y + stack.shape[1], x : x + stack.shape[2]], out=out)
    return out


def draw_line(angle, length, half, width):
    """uint8 (4 half + 1, 4 half + 1), 0 or 255: a line from the centre, its end rounded up."""
    centre = SCALE * half
    y = math.ceil(centre + SCALE * length * math.sin(angle))
    x = math.ceil(centre + SCALE * length * math.cos(angle))
    image = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    ImageDraw.Draw(image).line([(centre, centre), (x, y)], fill=255, width=width)
    return np.asarray(image)


def resample(fine, size, rendering):
    """LANCZOS of uint8 `fine` to float64 (size, size) with full coverage = 1, by the rule of `rendering`."""
    white = 255 if rendering == "original" else 1
    source = fine if rendering == "original" else fine.astype(np.float32) / 255
    small = Image.fromarray(source).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float64) / white


def dash_templates(lines, rendering):
    """`lines`: one uint8 (n, 4 half + 1, 4 half + 1) per margin -> (starts int64 of each template in the flat values,
    values float64). Templates of a margin are (2 half + 1, 2 half + 1) with the drawn end of the dash at the centre."""
    flat = [resample(line, (line.shape[0] + 1) // 2, rendering).ravel() for stack in lines for line in stack]
    return np.cumsum([0] + [len(t) for t in flat[:-1]]), np.concatenate(flat)


def marker_reach(radius):
    """Half width of a marker template: the disk and the support of the resampling filter."""
    return int(np.ceil(radius)) + 4


def marker_border(radius):
    """From this distance on the border of the image does not change a marker."""
    return int(np.ceil(radius)) + 6


def marker_templates(radius, rendering):
    """float64 (n, n, w, w): markers by distance from the borders of the image.

    The filter is cut off at a border, so a marker within n // 2 pixels of one looks different. Index i < n // 2 is the
    distance from the low border, n // 2 means far from both, n - 1 - i is the distance from the high border.
    """
    near, reach = marker_border(radius), marker_reach(radius)
    size = 2 * near + 1
    grid = np.arange(SCALE * size)
    out = np.zeros((size, size, 2 * reach + 1, 2 * reach + 1))
    for y in range(size):
        for x in range(size):
            inside = (grid[:, None] - SCALE * y) ** 2 + (grid[None, :] - SCALE * x) ** 2 <= (SCALE * radius) ** 2
            image = np.pad(resample(np.where(inside, 255, 0).astype(np.uint8), size, rendering), reach)
            out[y, x] = image[y : y + 2 * reach + 1, x : x + 2 * reach + 1]
    return out


@jit
def border_class(at, size, classes):
    near = classes // 2
    if at < near:
        return at
    return max(near, classes - size + at)


@jit
def draw(dashes, counts, markers, size, pad, halves, contrasts, templates, marker, floats, images, curves):
    """Draw images.

    dashes int32 (B, n, 5): y, x, heading, margin index, curve id; counts (B,): dashes of each image; markers int64
    (B, 2, 2): y, x; contrasts float64 (2,): of targets and distractors; templates: (starts, values, value from which a
    pixel belongs to a curve); floats: the "lra" rule, else the "original" one. Out: images uint8 (B, size, size), and
    curves the same or empty: the id of the brightest dash of each pixel, of equally bright ones the first placed.
    """
    template_at, template, level = templates
    classes, reach = marker.shape[0], marker.shape[2] // 2
    stride = size + 2 * pad
    canvas, spots = np.empty((stride, stride)), np.empty((stride, stride))
    owner = np.empty((stride, stride), np.uint8)
    for b in range(images.shape[0]):
        canvas[:], spots[:], owner[:] = 0, 0, 0
        for n in range(counts[b]):
            y, x, heading, which, curve = dashes[b, n]
            width = 2 * halves[which] + 1
            contrast = contrasts[0] if curve <= 2 else contrasts[1]
            for i in range(width):
                source = template_at[heading] + i * width
                row, left = y - halves[which] + pad + i, x - halves[which] + pad
                for j in range(width):
                    value = template[source + j] * contrast
                    if value > canvas[row, left + j]:
                        canvas[row, left + j] = value
                        if template[source + j] >= level:
                            owner[row, left + j] = curve
        for k in range(2):
            y, x = markers[b, k]
            ky, kx = border_class(y, size, classes), border_class(x, size, classes)
            for i in range(2 * reach + 1):
                for j in range(2 * reach + 1):
                    row, column = y - reach + pad + i, x - reach + pad + j
                    spots[row, column] = max(spots[row, column], marker[ky, kx, i, j])
        dash, spot = canvas[pad : pad + size, pad : pad + size], spots[pad : pad + size, pad : pad + size]
        brightest = dash.max() if floats else 1.0
        peak = max(dash.max() / brightest, spot.max())
        rounding = 0.0 if floats else 0.5
        for i in range(size):
            for j in range(size):
                value = max(dash[i, j] / brightest, spot[i, j])
                images[b, i, j] = np.uint8(255.0 * (value / peak) + rounding)
        if curves.shape[0] > 0:
            curves[b] = owner[pad : pad + size, pad : pad + size]
