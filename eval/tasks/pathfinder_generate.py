# SPDX-License-Identifier: Apache-2.0
"""The Pathfinder generator: specification, seeds and samples. Placement is in pathfinder_geometry.py, the drawing in
pathfinder_render.py; `tasks.pathfinder` is the module to import from."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .pathfinder_geometry import place
from .pathfinder_render import CURVE_LEVEL, dash_templates, draw, marker_border, marker_reach, marker_templates
from .pathfinder_tables import build_tables

RENDERINGS = ("lra", "original")
SPLITS = {"train": 160_000, "validation": 20_000, "test": 20_000}
INDEX_BITS, BASE_SEED_BITS = 50, 12

_PRESETS = {
    32: dict(dash_length=2, dash_thickness=0.5, dash_margins=(1,), padding=1, seed_distance=7, marker_radius=1.5,
             continuity=1.0, num_distractors=10, target_contrast=1.5, distractor_contrast=2.0),
    64: dict(dash_length=5, dash_thickness=1.0, dash_margins=(1,), padding=1, seed_distance=12, marker_radius=2.5,
             num_distractors=11, target_contrast=0.8, distractor_contrast=0.8),
    128: dict(dash_length=5, dash_thickness=1.5, dash_margins=(2, 3), padding=1, seed_distance=20, marker_radius=3,
              num_distractors=17, target_contrast=0.9, distractor_contrast=0.9),
    256: dict(dash_length=5, dash_thickness=2.0, dash_margins=(3,), padding=22, seed_distance=27, marker_radius=5,
              num_distractors=15),
}  # fmt: skip


_LEAST = dict(
    size=16,
    num_distractors=0,
    dash_length=1,
    dash_thickness=0.5,
    padding=1,  # an unmarked border would let dashes leave the image
    seed_distance=1,
    marker_radius=0.5,
    contour_length=2,
    distractor_length=1,
    continuity=1.0,
    target_contrast=0.01,
    distractor_contrast=0.0,
    dash_tries=1,
    distractor_tries=1,
    least_free=0.0,
    max_attempts=1,
)


@dataclass(frozen=True)
class PathfinderSpec:
    """Every parameter of the generator. Lengths are in pixels.

    The published sets differ only in these fields; change some with `dataclasses.replace`. Raises ValueError for values
    that can not give an image. Values that fit no canvas in practice are found while generating.
    """

    size: int  # height and width of the image
    num_distractors: int  # short curves tried after the targets; those that find no room are left out
    dash_length: int
    dash_thickness: float  # a multiple of 0.5
    dash_margins: tuple[int, ...]  # half the gap between dashes; one of them per image, uniformly
    padding: int  # border that stays empty
    seed_distance: int  # between the starts of the two targets; the first starts 2 seed_distance from every border
    marker_radius: float
    contour_length: int = 14  # dashes of each target
    distractor_length: int = 4  # dashes of each distractor
    continuity: float = 1.8  # turns stay below 90 / continuity degrees
    target_contrast: float = 1.0
    distractor_contrast: float = 1.0
    dash_tries: int = 3  # draws for each dash
    distractor_tries: int = 5  # attempts at each distractor
    least_free: float = 0.01  # no distractor is tried when a smaller fraction of the image is free
    max_attempts: int = 1_000_000  # at a pair of targets before giving up

    @classmethod
    def preset(cls, size: int) -> PathfinderSpec:
        """The "hard" set (contour length 14) of the Long Range Arena at 32, 64, 128 or 256 pixels."""
        if size not in _PRESETS:
            raise ValueError(
                f"no Pathfinder preset of size {size!r}, only of {', '.join(map(str, _PRESETS))}; for other sizes use "
                f"dataclasses.replace(PathfinderSpec.preset(128), size={size!r}, ...)"
            )
        return cls(size=size, **_PRESETS[size])

    def __post_init__(self):
        object.__setattr__(self, "dash_margins", tuple(self.dash_margins))
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"PathfinderSpec.{name} is {getattr(self, name)!r}; it must be at least {least}")
        if not self.dash_margins or min(self.dash_margins) < 1:
            raise ValueError(f"PathfinderSpec.dash_margins is {self.dash_margins!r}; give integers of at least 1")
        if self.dash_thickness * 2 % 1:
            raise ValueError(f"PathfinderSpec.dash_thickness is {self.dash_thickness}; it must be a multiple of 0.5")
        if self.num_distractors > 253:
            raise ValueError(f"PathfinderSpec.num_distractors is {self.num_distractors}; 8-bit curve ids allow 253")
        least = max(2 * marker_border(self.marker_radius) + 1, 2 * self.padding + 1)
        if self.size < least:
            raise ValueError(
                f"PathfinderSpec.size is {self.size}; marker_radius {self.marker_radius} and padding {self.padding} "
                f"need at least {least}"
            )


class Samples(NamedTuple):
    """Arrays of B samples; a single sample of `generate` has the same fields without the batch dimension."""

    image: np.ndarray  # uint8 (B, size, size)
    label: np.ndarray  # int64 (B,): 1 when both markers lie on one curve
    curve_ids: np.ndarray  # uint8 (B, size, size): 0 background, 1, 2 long curves, 3.. distractors; brightest dash wins
    marked: np.ndarray  # int64 (B, 2): curve ids of marker A (at the start of a curve) and marker B (at the end of one)
    markers: np.ndarray  # int64 (B, 2, 2): y, x of marker A and marker B
    margin: np.ndarray  # int64 (B,): dash margin
    num_distractors: np.ndarray  # int64 (B,): distractors that found room
    attempts: np.ndarray  # int64 (B,): pairs of long curves tried


def split_seed(split: str, index: int, base_seed: int = 0) -> int:
    """64-bit seed of image `index` of a split. Distinct for every (split, base_seed, index), so splits never overlap.

    index < 2^50, base_seed < 2^12. "train" may be read far beyond its nominal 160,000 images.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if not (0 <= index < 2**INDEX_BITS and 0 <= base_seed < 2**BASE_SEED_BITS):
        raise ValueError(
            f"index {index} must be in [0, 2^{INDEX_BITS}), base_seed {base_seed} in [0, 2^{BASE_SEED_BITS})"
        )
    return (list(SPLITS).index(split) << INDEX_BITS + BASE_SEED_BITS) | (int(base_seed) << INDEX_BITS) | int(index)


@functools.lru_cache(maxsize=8)
def prepare(spec):
    """(tables, rules, moves) for `place`."""
    tables = build_tables(spec, marker_reach(spec.marker_radius))
    margins_without = [m for m, fits in zip(spec.dash_margins, np.diff(tables.seeds[3]), strict=True) if fits == 0]
    if margins_without:
        side = max(0, spec.size - 4 * spec.seed_distance)
        raise ValueError(
            f"no first dash with margin {margins_without[0]} fits: size {spec.size} leaves {side} x {side} pixels "
            f"2 x seed_distance = {2 * spec.seed_distance} away from every border; use a larger size or a smaller "
            f"seed_distance"
        )
    rules = (
        spec.size,
        tables.pad,
        spec.dash_length,
        spec.seed_distance,
        spec.contour_length,
        spec.num_distractors,
        spec.distractor_length,
        spec.dash_tries,
        spec.distractor_tries,
        int(np.ceil(spec.least_free * spec.size**2)),
        spec.max_attempts,
    )
    return tables, rules, (tables.margins, tables.turns, tables.masks, tables.seeds)


@functools.lru_cache(maxsize=8)
def _drawing(spec, rendering):
    tables = prepare(spec)[0]
    starts, values = dash_templates(tables.lines, rendering)
    contrasts = np.array([spec.target_contrast, spec.distractor_contrast])
    level = CURVE_LEVEL * values.max()
    return tables.halves, contrasts, (starts, values, level), marker_templates(spec.marker_radius, rendering)


def _threads(num_workers):
    """Threads to use: as asked, else one per core, but a single one inside a DataLoader worker."""
    if num_workers is not None:
        return max(1, num_workers)
    from torch.utils.data import get_worker_info

    return 1 if get_worker_info() is not None else len(os.sched_getaffinity(0))


def generate_samples(spec, seeds, rendering="lra", num_workers=None, with_curves=True) -> Samples:
    """Samples for 64-bit seeds, in their order; without curves `curve_ids` is empty, (0, size, size).

    num_workers: threads, by default one per core, or one inside a DataLoader worker. Raises ValueError for a rendering
    or seed out of range, RuntimeError when `spec.max_attempts` pairs of long curves all failed.
    """
    if rendering not in RENDERINGS:
        raise ValueError(f"rendering is {rendering!r}; it must be one of {', '.join(RENDERINGS)}")
    if any(not 0 <= seed < 2**64 for seed in seeds):
        raise ValueError("seeds must be integers in [0, 2^64); split_seed makes them")
    numbers = np.array(seeds, np.uint64)
    tables, rules, moves = prepare(spec)
    halves, contrasts, templates, marker = _drawing(spec, rendering)
    total, dashes = len(numbers), 2 * spec.contour_length + spec.num_distractors * spec.distractor_length
    images = np.empty((total, spec.size, spec.size), np.uint8)
    curves = np.empty((total if with_curves else 0, spec.size, spec.size), np.uint8)
    markers, facts, stop = np.empty((total, 2, 2), np.int64), np.zeros((total, 6), np.int64), np.zeros(1, np.uint8)

    def work(chunk):
        count = chunk.stop - chunk.start
        rows, counts = np.empty((count, dashes, 5), np.int32), np.empty(count, np.int64)
        place(numbers[chunk], rules, moves, rows, counts, markers[chunk], facts[chunk], stop)
        if not stop[0]:
            draw(rows, counts, markers[chunk], spec.size, tables.pad, halves, contrasts, templates, marker,
                 rendering == "lra", images[chunk], curves[chunk])  # fmt: skip

    threads = min(_threads(num_workers), max(total, 1))
    length = max(1, min(64, -(-total // threads)))
    chunks = [slice(first, min(first + length, total)) for first in range(0, total, length)]
    if threads == 1:
        for chunk in chunks:
            work(chunk)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, chunks))
    if stop[0]:
        raise RuntimeError(
            f"{spec.max_attempts} attempts at two curves of {spec.contour_length} dashes failed; use a larger size, "
            f"or a smaller contour_length, dash_length or dash_margins than {spec}"
        )
    return Samples(images, facts[:, 0], curves, facts[:, 1:3], markers, facts[:, 3], facts[:, 4], facts[:, 5])


def generate(spec, seed, rendering="lra") -> Samples:
    """One sample: `Samples` with the batch dimension taken off."""
    return Samples(*(field[0] for field in generate_samples(spec, [seed], rendering, num_workers=1)))


def generate_batch(spec, seeds, rendering="lra", num_workers=None):
    """(images uint8 (B, size, size), labels int64 (B,)); see `generate_samples`."""
    samples = generate_samples(spec, seeds, rendering, num_workers, with_curves=False)
    return samples.image, samples.label
