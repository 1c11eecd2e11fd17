# SPDX-License-Identifier: Apache-2.0
"""Where the dashes of a Pathfinder image go, compiled.

The rules are those of the generator of Linsley et al. 2018 (arXiv 1805.08315, github.com/drewlinsley/pathfinder), which
made the Pathfinder sets of the Long Range Arena (arXiv 2011.04006). Positions are integers (y, x) with y down. An angle
points along (sin, cos). A step of length d along it ends at ceil(p + d (sin, cos)), both components rounded up.

Shared by the functions below: ``rules`` are the numbers of the specification, see `pathfinder_generate.prepare`;
``canvas`` uint8 (2, cells) holds the occupancy and the same dilated by the dash margin; ``state`` uint64 (1,) is the
random stream; ``moves`` is (margins, turns, masks, seeds) of `Tables`. A ``curve`` is int64 (5,): y, x of the pivot
(the next dash begins a step of length + 2 margin further), heading, y, x of the end from which the last was drawn.
"""

from __future__ import annotations

import numpy as np

from .pathfinder_render import jit
from .pathfinder_tables import DEGREES, FREE

QUICK_DRAWS = 64


@jit
def next_u64(state):
    """SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@jit
def below(state, n):
    """Uniform integer in [0, n)."""
    return np.int64(((next_u64(state) >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32))


@jit
def uniform(state):
    """Uniform float64 in [0, 1)."""
    return np.float64(next_u64(state) >> np.uint64(11)) / 9007199254740992.0


@jit
def step(at, length, direction):
    return np.int64(np.ceil(at + length * direction))


@jit
def copy(target, source):
    """A plain loop over 1-D arrays becomes a vector copy; numba's slice assignment does not."""
    for i in range(len(target)):
        target[i] = source[i]


@jit
def stamp(curve, canvas, rules, masks):
    """Mark the last dash of a curve as occupied. Dilation and maximum commute, so the dilated canvas is kept up to date
    by the dilated mask."""
    start, cell, value, wide_start, wide_cell, wide_value = masks[:6]
    size, pad = rules[0], rules[1]
    at, heading = (curve[3] + pad) * (size + 2 * pad) + curve[4] + pad, curve[2]
    for k in range(start[heading], start[heading + 1]):
        i = at + cell[k]
        canvas[0, i] = max(canvas[0, i], value[k])
    for k in range(wide_start[heading], wide_start[heading + 1]):
        i = at + wide_cell[k]
        canvas[1, i] = max(canvas[1, i], wide_value[k])


@jit
def record(dash, curve, which, curve_id):
    dash[0], dash[1], dash[2], dash[3], dash[4] = curve[3], curve[4], curve[2], which, curve_id


@jit
def begin(curve, y, x, heading, margin, rules, turns):
    """Start a curve with a dash from (y, x); False if an end of it or its pivot is outside the image."""
    size, length = rules[0], rules[2]
    hy, hx = step(y, length, turns[0][heading]), step(x, length, turns[1][heading])
    py, px = step(hy, length + margin, turns[2][heading]), step(hx, length + margin, turns[3][heading])
    curve[0], curve[1], curve[2], curve[3], curve[4] = py, px, heading, y, x
    return 0 <= min(y, x, hy, hx, py, px) and max(y, x, hy, hx, py, px) < size


@jit
def extend(curve, margin, canvas, sums, state, rules, moves):
    """Add a dash to a curve; False if no place for it was found.

    The far end is drawn with probability cos^2(continuity * turn) * (1 - dilated occupancy), and redrawn if the dash
    would clash. The dash before it becomes occupied only now, so that the two may touch.
    """
    size, pad, length, tries = rules[0], rules[1], rules[2], rules[7]
    sine, cosine, _, _, shift, turn_start, turn, weight = moves[1]
    core_start, core, limit = moves[2][6:]
    stride, heading = size + 2 * pad, curve[2]
    y0 = step(curve[0], length + 2 * margin, sine[heading])
    x0 = step(curve[1], length + 2 * margin, cosine[heading])
    first, count, total = turn_start[heading], turn_start[heading + 1] - turn_start[heading], 0.0
    for k in range(count):
        y, x = y0 + shift[turn[first + k], 0], x0 + shift[turn[first + k], 1]
        if 0 <= y < size and 0 <= x < size:
            total += weight[first + k] * (1.0 - canvas[1, (y + pad) * stride + x + pad] / 255.0)
        sums[k] = total
    if total < 1e-4:
        return False
    for _ in range(tries):
        aim, k = uniform(state) * total, 0
        while k < count - 1 and sums[k] <= aim:
            k += 1
        ahead = turn[first + k]
        y, x = y0 + shift[ahead, 0], x0 + shift[ahead, 1]
        at, clear = (y + pad) * stride + x + pad, True
        for c in range(core_start[ahead], core_start[ahead + 1]):
            if canvas[0, at + core[c]] >= limit[c]:
                clear = False
                break
        if clear:
            stamp(curve, canvas, rules, moves[2])
            curve[0], curve[1], curve[2], curve[3], curve[4] = y0, x0, ahead, y, x
            return True
    return False


@jit
def place_pair(dashes, curves, which, canvas, sums, state, rules, moves):
    """One attempt at the two target snakes, growing in turns; their dashes go to rows 0 .. 2 contour_length - 1."""
    margins, turns, masks, seeds = moves
    distance, contour, tries = rules[3], rules[4], rules[7]
    boxes, seed_start, seed_heading = seeds[2:]
    margin = margins[0][which]
    copy(canvas[0], margins[2][0])
    copy(canvas[1], margins[2][which + 1])
    begun = False
    for _ in range(tries):
        heading = seed_heading[seed_start[which] + below(state, seed_start[which + 1] - seed_start[which])]
        y = boxes[heading, 0] + below(state, boxes[heading, 1] - boxes[heading, 0] + 1)
        x = boxes[heading, 2] + below(state, boxes[heading, 3] - boxes[heading, 2] + 1)
        begun = begin(curves[0], y, x, heading, margin, rules, turns)
        if begun:
            break
    if not begun:
        return False
    begun = False
    for _ in range(tries):
        heading = margins[1][which] + below(state, DEGREES)
        around = margins[1][which] + (below(state, DEGREES) + DEGREES // 2) % DEGREES
        y = np.int64(np.rint(curves[0, 3] + distance * turns[0][around]))
        x = np.int64(np.rint(curves[0, 4] + distance * turns[1][around]))
        begun = begin(curves[1], y, x, heading, margin, rules, turns)
        if begun:
            break
    if not begun:
        return False
    for n in range(2 * contour):
        if n >= 2 and not extend(curves[n % 2], margin, canvas, sums, state, rules, moves):
            return False
        record(dashes[n], curves[n % 2], which, n % 2 + 1)
    # the generator leaves out the last dash of snake 1, so distractors may run into it
    stamp(curves[1], canvas, rules, masks)
    return True


@jit
def has_room(canvas, rules):
    """True when enough pixels are free for another distractor to be worth a try."""
    size, pad, least = rules[0], rules[1], rules[9]
    free = 0
    for y in range(pad, pad + size):
        for i in range(y * (size + 2 * pad) + pad, y * (size + 2 * pad) + pad + size):
            free += canvas[0, i] <= FREE
        if free >= least:
            return True
    return False


@jit
def free_tail(canvas, heading, state, rules, seeds):
    """A uniform pixel from which a first dash fits; (-1, -1) if there is none."""
    size, pad = rules[0], rules[1]
    start, cell = seeds[0], seeds[1]
    found, ty, tx = 0, -1, -1
    if start[heading] == start[heading + 1]:
        return ty, tx
    # uniform draws are cheap while there is room; after them every pixel is looked at and the n-th that fits is kept
    # with probability 1/n
    for attempt in range(QUICK_DRAWS + size * size):
        i = below(state, size * size) if attempt < QUICK_DRAWS else attempt - QUICK_DRAWS
        y, x = i // size, i % size
        at, clear = (y + pad) * (size + 2 * pad) + x + pad, True
        for k in range(start[heading], start[heading + 1]):
            if canvas[0, at + cell[k]] > FREE:
                clear = False
                break
        if clear:
            found += 1
            if attempt < QUICK_DRAWS or below(state, found) == 0:
                ty, tx = y, x
            if attempt < QUICK_DRAWS:
                break
    return ty, tx


@jit
def place_distractor(dashes, curve, which, curve_id, canvas, sums, state, rules, moves):
    """One attempt at a distractor; after a failure the caller restores the canvas."""
    margins, turns, masks, seeds = moves
    contour, tries = rules[6], rules[7]
    margin, begun = margins[0][which], False
    for _ in range(tries):
        heading = margins[1][which] + below(state, DEGREES)
        if not has_room(canvas, rules):
            return False
        y, x = free_tail(canvas, heading, state, rules, seeds)
        if y < 0:
            return False
        begun = begin(curve, y, x, heading, margin, rules, turns)
        if begun:
            break
    if not begun:
        return False
    for n in range(contour):
        if n > 0 and not extend(curve, margin, canvas, sums, state, rules, moves):
            return False
        record(dashes[n], curve, which, curve_id)
    stamp(curve, canvas, rules, masks)
    return True


@jit
def place(numbers, rules, moves, dashes, counts, marks, facts, stop):
    """Lay out one image per seed of `numbers` uint64 (B,).

    Out: dashes int32 (B, n, 5): y, x, heading, margin index, curve id (1, 2: the target snakes, 3..: distractors);
    counts int64 (B,); marks int64 (B, 2, 2): (y, x) of marker A at the start of a snake and marker B at the end of one;
    facts int64 (B, 6): label, curve of A, curve of B, margin, distractors placed, attempts at the target pair.
    stop uint8 (1,): set when no attempt succeeded, upon which every thread gives up.
    """
    margins = moves[0]
    contour, distractors, distractor_contour = rules[4:7]
    distractor_tries, most_attempts = rules[8], rules[10]
    canvas, backup = np.empty((2, margins[2].shape[1]), np.uint8), np.empty((2, margins[2].shape[1]), np.uint8)
    sums, curves, state = np.empty(margins[1][-1]), np.empty((2, 5), np.int64), np.empty(1, np.uint64)
    for b in range(len(numbers)):
        state[0] = numbers[b]
        state[0] = next_u64(state)  # neighbouring seeds start far apart
        label, which, origin = below(state, 2), below(state, len(margins[0])), below(state, 2)
        attempts, done = 0, False
        while not done and attempts < most_attempts and stop[0] == 0:
            attempts += 1
            done = place_pair(dashes[b], curves, which, canvas, sums, state, rules, moves)
        if not done:
            stop[0] = 1
            return
        end = origin if label == 1 else 1 - origin
        for axis in range(2):
            marks[b, 0, axis] = dashes[b, origin, axis]
            marks[b, 1, axis] = dashes[b, 2 * contour - 2 + end, axis]
        placed = 0
        for _ in range(distractors):
            copy(backup.ravel(), canvas.ravel())
            for _ in range(distractor_tries):
                rows = dashes[b, 2 * contour + placed * distractor_contour :]
                if place_distractor(rows, curves[0], which, placed + 3, canvas, sums, state, rules, moves):
                    placed += 1
                    break
                copy(canvas.ravel(), backup.ravel())
        counts[b] = 2 * contour + placed * distractor_contour
        facts[b, 0], facts[b, 1], facts[b, 2] = label, origin + 1, end + 1
        facts[b, 3], facts[b, 4], facts[b, 5] = margins[0][which], placed, attempts
