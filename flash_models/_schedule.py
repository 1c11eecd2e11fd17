# SPDX-License-Identifier: Apache-2.0
"""Cutting long rows of a block layout into pieces, so that no worker owns one that takes far longer than the others."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class WorkSchedule:
    """Work items, each a piece of one line: of a row of blocks (forward, dq), or of a column of blocks (dk, dv).

    Line h * lines_per_head + i is row or column i of head h of the layout. Item n visits the listed blocks at the
    positions `first[n] .. last[n] - 1` of the layout's `row_index` or `col_index`, at most `max_blocks`. A line that
    is one item, which also a line without blocks is, has slot -1: the item writes the line's result. Of a longer line,
    item n leaves a partial result in slot `slot[n]`, and the slots of line r, `slot_start[r] .. slot_start[r + 1] - 1`,
    are then combined: outputs weighted by exp(lse - combined lse), gradients summed.

    The pieces of a line follow each other and differ in length by at most one block. The host knows bounds, not counts:
    spare items, which all come last, have line -1 and no blocks.
    """

    max_blocks: int
    lines_per_head: int
    line: torch.Tensor  # int32 (max_items,), -1: spare
    first: torch.Tensor  # int32 (max_items,)
    last: torch.Tensor  # int32 (max_items,), one past the last position
    slot: torch.Tensor  # int32 (max_items,), -1: not a partial result
    slot_start: torch.Tensor  # int32 (lines + 1,), an empty range for lines of one item
    max_slots: int  # partial results of all lines together, or more

    @property
    def max_items(self):
        """Items, or more: the number of workers to start."""
        return self.line.numel()


def make_schedule(start, max_blocks, *, max_length, max_listed):
    """The schedule of lists that begin and end at `start`, int32 (Hl, lines_per_head + 1), as in `BlockLayout`.

    max_length, max_listed: upper bounds of the length of one list and of all together, which bound the sizes.
    """
    lines = start.shape[0] * (start.shape[1] - 1)
    # ceil(length / max_blocks) <= 1 + floor(length / max_blocks), and longer lines have more than max_blocks entries
    pieces_at_most = -(-max_length // max_blocks)
    max_items = min(lines * max(pieces_at_most, 1), lines + max_listed // max_blocks)
    max_slots = min(max_items, max_listed // max_blocks + max_listed // (max_blocks + 1)) if pieces_at_most > 1 else 0

    begin, length = start[:, :-1].flatten().long(), start.diff(dim=1).flatten().long()
    pieces = ((length + max_blocks - 1) // max_blocks).clamp(min=1)
    item_end = pieces.cumsum(0)
    slot_start = F.pad(torch.where(pieces > 1, pieces, 0).cumsum(0), (1, 0))

    item = torch.arange(max_items, device=start.device)
    line = torch.searchsorted(item_end, item, right=True)
    spare = line == lines
    line = line.clamp(max=lines - 1)
    of_line = pieces[line]
    piece = item - (item_end[line] - of_line)
    first = begin[line] + length[line] * piece // of_line
    last = begin[line] + length[line] * (piece + 1) // of_line
    return WorkSchedule(
        max_blocks=max_blocks,
        lines_per_head=start.shape[1] - 1,
        line=torch.where(spare, -1, line).int(),
        first=torch.where(spare, 0, first).int(),
        last=torch.where(spare, 0, last).int(),
        slot=torch.where(spare | (of_line == 1), -1, slot_start[line] + piece).int(),
        slot_start=slot_start.int(),
        max_slots=max_slots,
    )
