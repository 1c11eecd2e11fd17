# SPDX-License-Identifier: Apache-2.0
"""Lookup tables for the placement of Pathfinder dashes.

All angles that can occur are known in advance: 360 whole degrees for the first dash of a curve, then one for each pixel
of the circle on which a curve may continue. They are numbered as *headings*, separately for each dash margin, and every
mask and every turning weight is looked up by heading. Occupancy counts in steps of 1/255, as in the generator of
Linsley et al. 2018 (github.com/drewlinsley/pathfinder).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .pathfinder_render import SCALE, dilate, draw_line, resample

DEGREES = 360  # headings of a first dash
FREE = 76  # an occupancy of at most 0.3 counts as free


class Tables(NamedTuple):
    """H headings over all margins; `start` arrays (H + 1,) index the ragged lists that follow them. A cell is an offset
    into a flattened canvas, which has `pad` pixels around the image so that nothing needs clipping."""

    pad: int
    halves: np.ndarray  # int64 (margins,): half width of a dash's mask and template
    lines: tuple  # per margin uint8 (headings, 4 half + 1, 4 half + 1): the dash on the fine canvas
    margins: tuple  # margin (margins,), first heading of each (margins + 1,), empty canvases (1 + margins, cells)
    turns: tuple  # sin, cos, sin and cos of the reverse, offset of the far end (H, 2), (start, next heading, weight)
    masks: tuple  # (start, cell, value) of a mask, the same dilated by the margin, (start, cell, limit) of its core
    seeds: tuple  # (start, cell) that a first dash needs free, tails of snake 1 (H, 4), (start, heading) for snake 1


def turn_circle(radius):
    """Unique pixel offsets (n, 2) of the circle on which the far end of the next dash may lie."""
    angles = np.arange(0, 360, 360 / (2 * np.pi * radius)) * np.pi / 180
    return np.unique(np.floor(radius * np.stack([np.sin(angles), np.cos(angles)], 1)).astype(np.int64), axis=0)


def needed_cells(mask, half, reach):
    """Offsets (n, 2) from a tail to the pixels that a first dash needs free; none if it can not be placed at all.

    Two habits of the generator shape the images and are kept: the mask is cut by a window of `reach` pixels whose
    centre is one pixel off the tail and used as if it were centred, which shifts it by (+1, +1); and a mask which some
    pixel at the image border sees entirely outside the image is taken for "no room" everywhere.
    """
    offsets = np.argwhere(mask == 255) - half
    offsets = offsets[((offsets >= -(reach + 1)) & (offsets <= reach - 1)).all(1)] + 1
    quadrants = [(sy * offsets[:, 0] >= 0) & (sx * offsets[:, 1] >= 0) for sy in (-1, 1) for sx in (-1, 1)]
    return offsets if all(q.any() for q in quadrants) else offsets[:0]


def clash_limits():
    """int64 (256,): smallest occupancy that rejects a dash of each mask value (sum >= 1.8); 256 if none does."""
    value = np.arange(256) / 255
    return np.array([np.argmin(np.append(value + v < 1.8, False)) for v in value])


def ragged(lists, dtype=np.int64):
    """Concatenate lists; (starts int64 (n + 1,), values)."""
    starts = np.cumsum([0] + [len(item) for item in lists])
    return starts, np.concatenate(lists).astype(dtype)


def angles_of(circle):
    """(headings, angles at which their dashes are drawn), float64 (360 + n,): a first dash is drawn from its tail along
    its heading, every other one backwards from its far end."""
    onward = np.array([math.atan2(y, x) for y, x in circle])
    degrees = np.arange(-180, 180) * np.pi / 180
    return np.concatenate([degrees, onward]), np.concatenate([degrees, reverse(onward)])


def reverse(angle):
    return np.where(angle < 0, angle + np.pi, angle - np.pi)


def dash_masks(spec, margin, half, drawn):
    """(lines uint8 (n, 4 half + 1, 4 half + 1), masks uint8 (n, 2 half + 1, 2 half + 1)): the dashes on the fine canvas
    and what they occupy, which is the line widened by the margin."""
    width = round(SCALE * spec.dash_thickness)
    lines = np.stack([draw_line(angle, spec.dash_length, half, width) for angle in drawn])
    masks = [resample(m, 2 * half + 1, "original") for m in dilate(lines, SCALE * margin)]
    return lines, np.rint(255 * np.stack(masks)).astype(np.uint8)


def turn_weights(headings, onward, continuity):
    """float64 (headings, onward): cos^2 of the turn times `continuity`, 0 from a right angle on."""
    bend = np.abs(headings[:, None] - onward[None, :])
    return np.cos(np.minimum(np.minimum(bend, 2 * np.pi - bend) * continuity, np.pi / 2)) ** 2


def build_tables(spec, pad) -> Tables:
    """Tables of `spec` (a PathfinderSpec); canvases get at least `pad` pixels around the image."""
    halves = [spec.dash_length + int(np.ceil(spec.dash_thickness)) + margin for margin in spec.dash_margins]
    pad = max([pad, *(half + margin for half, margin in zip(halves, spec.dash_margins, strict=True))])
    stride = spec.size + 2 * pad
    low = max(2 * spec.seed_distance, spec.padding)  # the first dash of snake 1 lies in [low, size - low)
    limit = clash_limits()
    empty = np.full((1, stride, stride), 255, np.uint8)  # the pad and the border of the image are taken
    border = pad + spec.padding
    empty[:, border:-border, border:-border] = 0

    firsts, angles, shifts, lines, turn, weight, canvases = [0], [], [], [], [], [], [empty]
    masks, rooms, cores, needed, boxes, fits, fit_start = [], [], [], [], [], [], [0]

    def cells(mask):
        y, x = np.nonzero(mask)
        return (y - len(mask) // 2) * stride + x - len(mask) // 2, mask[y, x]

    for margin, half in zip(spec.dash_margins, halves, strict=True):
        circle = turn_circle(spec.dash_length + margin)
        headings, drawn = angles_of(circle)
        line, mask = dash_masks(spec, margin, half, drawn)
        masks += [cells(m) for m in mask]
        rooms += [cells(m) for m in dilate(np.pad(mask, ((0, 0), (margin, margin), (margin, margin))), margin)]
        cores += [cells(np.where(limit[m] < 256, limit[m], 0)) for m in mask]
        for row in turn_weights(headings, headings[DEGREES:], spec.continuity):
            likely = np.flatnonzero(row > 1e-20)
            turn.append(likely + firsts[-1] + DEGREES)
            weight.append(row[likely])
        for i in range(len(headings)):
            need = needed_cells(mask[i], half, spec.dash_length + margin) if i < DEGREES else circle[:0]
            box = (1, 0, 1, 0)
            if len(need):
                (y0, x0), (y1, x1) = low - need.min(0), spec.size - low - 1 - need.max(0)
                box = (y0, y1, x0, x1)
                if y0 <= y1 and x0 <= x1:
                    fits.append(firsts[-1] + i)
            needed.append(need @ np.array([stride, 1]))
            boxes.append(box)
        angles.append(headings)
        shifts.append(np.concatenate([np.zeros((DEGREES, 2), np.int64), circle]))
        lines.append(line)
        canvases.append(dilate(empty, margin))
        firsts.append(firsts[-1] + len(headings))
        fit_start.append(len(fits))

    angle, shift = np.concatenate(angles), np.concatenate(shifts)
    back = np.where(angle + np.pi < np.pi, angle + np.pi, angle - np.pi)
    # numpy's vector functions differ between processors in the last bit, and rounding up makes a pixel of it
    directions = [np.array([f(a) for a in theta]) for theta in (angle, back) for f in (math.sin, math.cos)]

    def columns(pairs, dtype):
        return *ragged([pair[0] for pair in pairs], np.int32), np.concatenate([pair[1] for pair in pairs]).astype(dtype)

    return Tables(
        pad,
        np.array(halves, np.int64),
        tuple(lines),
        (np.array(spec.dash_margins), np.array(firsts), np.concatenate(canvases).reshape(-1, stride**2)),
        (*directions, shift, *ragged(turn), np.concatenate(weight)),
        columns(masks, np.uint8) + columns(rooms, np.uint8) + columns(cores, np.int32),
        (*ragged(needed), np.array(boxes, np.int64), np.array(fit_start), np.array(fits, np.int64)),
    )
