# SPDX-License-Identifier: Apache-2.0
"""Cutting long lines of a block layout into pieces, so that no worker owns one that takes far longer than others."""

from ._layout_ops import work_items

MIN_PIECE = 16  # blocks
PIECE_OVER_MEAN = 8
MIN_PARTIAL = 32  # partial results of one pattern


def piece_size(lines, max_listed):
    """Blocks of the longest piece that a worker gets, for `max_listed` blocks over so many lines."""
    return max(MIN_PIECE, PIECE_OVER_MEAN * -(-max_listed // max(lines, 1)))


def make_schedule(start, max_blocks, *, max_length, max_listed, max_partial=None):
    """Work items, each a piece of one line: of a row of blocks (forward), or of a column of blocks (dk, dv).

    start: int32 (Hl, lines + 1), where the lists of every line begin and end, as in `BlockLayout`. max_length,
    max_listed: upper bounds of the length of one list and of all together, which bound the sizes; max_partial: of the
    partial results, an eighth of the lines if None. What would exceed it stays whole.

    Returns int32 (Hl * lines + n, 4), n the most partial results there can be. Item (line, first, last, slot) visits
    the listed blocks at the positions first .. last - 1 of `row_index` or `col_index`, at most `max_blocks` where the
    line is cut. Line h * lines + i is row or column i of head h of the layout. A line that is one item, which also a
    line without blocks is, has slot -1: the item writes the line's result. The items of a longer line follow each
    other, differ in length by at most one block, and leave partial results in slots of their own, to be combined:
    outputs weighted by exp(lse - combined lse), gradients summed. The host knows bounds, not counts: spare items, which
    come last, have line -1 and no blocks.
    """
    lines = start.shape[0] * (start.shape[1] - 1)
    if max_partial is None:
        max_partial = max(MIN_PARTIAL * start.shape[0], lines // 8)
    # a line that is cut has more than max_blocks entries and ceil(length / max_blocks) <= 1 + floor(...) pieces
    if max_length <= max_blocks:
        max_partial = 0
    max_partial = min(max_partial, max_listed // max_blocks + max_listed // (max_blocks + 1))
    return work_items(start, max_blocks, max_partial)
