# SPDX-License-Identifier: Apache-2.0
"""Schedules of block layouts: every listed block is one item's, and partial results combine to the exact ones."""

import pytest
import torch

from flash_models import layouts
from flash_models.reference import attention_reference


def random_mask(heads, rows, cols, density=0.5):
    """Random blocks with a full row, a full column, an empty row and an empty column."""
    mask = torch.rand(heads, rows, cols) < density
    mask[:, 0], mask[:, :, 0] = True, True
    mask[:, 2], mask[:, :, 1] = False, False
    return mask


def some_layouts(device):
    local = layouts.local(700, 64, block_size=64, device=device)
    return {
        "shared": layouts.from_block_mask(random_mask(1, 7, 9).to(device), 7 * 64 - 10, 9 * 64, 64),
        "heads": layouts.from_block_mask(random_mask(3, 4, 5).to(device), 512, 600, 128),
        "mixture": layouts.per_head([local, layouts.butterfly(700, block_size=64, device=device), local]),
        "global": layouts.local_global(2000, 64, 64, block_size=64, device=device),
        "empty": layouts.from_block_mask(torch.zeros(3, 3, dtype=torch.bool, device=device), 192, 192, 64),
        "one": layouts.dense(5, device=device),
    }


NAMES = list(some_layouts("cpu"))


def items_of(schedule):
    """(line, first, last, slot) of every item that is not spare."""
    columns = (schedule.line, schedule.first, schedule.last, schedule.slot)
    assert all(column.dtype == torch.int32 and column.shape == (schedule.max_items,) for column in columns)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    items = [row for row in rows if row[0] >= 0]
    assert rows[len(items) :] == [(-1, 0, 0, -1)] * (len(rows) - len(items))  # the spare ones
    return items


@pytest.mark.parametrize("max_blocks", [1, 2, 3, 8, 1000])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("name", NAMES)
def test_every_line_is_cut_into_its_pieces(device, name, transposed, max_blocks):
    layout = some_layouts(device)[name]
    schedule = layout.schedule(max_blocks, transposed=transposed)
    start = (layout.col_start if transposed else layout.row_start).tolist()
    lines = [(head[i], head[i + 1]) for head in start for i in range(len(head) - 1)]
    assert (schedule.max_blocks, schedule.lines_per_head) == (max_blocks, len(start[0]) - 1)
    slot_start = schedule.slot_start.tolist()
    assert len(slot_start) == len(lines) + 1 and slot_start[0] == 0 and slot_start[-1] <= schedule.max_slots

    pieces, next_slot = {}, 0
    for line, first, last, slot in items_of(schedule):
        pieces.setdefault(line, []).append((first, last))
        if slot >= 0:
            assert slot == next_slot and slot_start[line] <= slot < slot_start[line + 1]
            next_slot += 1
        else:
            assert slot_start[line] == slot_start[line + 1] and len(pieces[line]) == 1
    assert list(pieces) == list(range(len(lines))) and next_slot == slot_start[-1]
    for line, (begin, end) in enumerate(lines):
        bounds = [begin, *(last for _, last in pieces[line])]
        assert pieces[line] == list(zip(bounds, bounds[1:], strict=False)) and bounds[-1] == end  # without gaps
        lengths = [last - first for first, last in pieces[line]]
        assert max(lengths) <= max_blocks and max(lengths) - min(lengths) <= 1
        assert len(lengths) == max(1, -(-(end - begin) // max_blocks))


def partial_forward(layout, q, k, v, head, row, first, last):
    """out, not NaN, and lse of one row of blocks over the listed blocks at the positions first .. last - 1, causal."""
    size = layout.block_size
    rows = torch.arange(row * size, min((row + 1) * size, q.shape[0]))
    blocks = layout.row_index[first:last].tolist()
    keys = torch.cat([torch.arange(0), *(torch.arange(b * size, min((b + 1) * size, k.shape[0])) for b in blocks)])
    scores = q[rows, head] @ k[keys, head].T * q.shape[-1] ** -0.5
    scores.masked_fill_(keys > rows[:, None] + k.shape[0] - q.shape[0], -torch.inf)
    lse = scores.logsumexp(-1) if len(keys) else torch.full((len(rows),), -torch.inf, dtype=q.dtype)
    weights = torch.where(scores == -torch.inf, 0, (scores - lse[:, None]).exp())
    return rows, weights @ v[keys, head], lse


@pytest.mark.parametrize("max_blocks", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_partial_outputs_combine_to_the_exact_one(name, max_blocks):
    """What a kernel does with the schedule: items in any order, then a combination for each line that was cut."""
    layout = some_layouts("cpu")[name]
    heads = 3
    q, k, v = (torch.randn(n, heads, 8, dtype=torch.float64) for n in (layout.seqlen_q, *[layout.seqlen_k] * 2))
    out, lse = torch.full_like(q, torch.nan), torch.full((heads, len(q)), torch.nan, dtype=torch.float64)
    schedule = layout.schedule(max_blocks)
    items = items_of(schedule)
    slot_start = schedule.slot_start.tolist()
    for head in range(heads):
        partial = [None] * schedule.max_slots
        for number in torch.randperm(len(items)).tolist():
            line, first, last, slot = items[number]
            list_head, row = divmod(line, schedule.lines_per_head)
            if list_head not in (0, head) or (layout.num_heads > 1 and list_head != head):
                continue
            rows, piece, piece_lse = partial_forward(layout, q, k, v, head, row, first, last)
            if slot >= 0:
                partial[slot] = rows, piece, piece_lse
            else:
                out[rows, head], lse[head, rows] = piece, piece_lse
        for begin, end in zip(slot_start, slot_start[1:], strict=False):
            parts = [part for part in partial[begin:end] if part is not None]
            if parts:
                rows, lses = parts[0][0], torch.stack([piece_lse for _, _, piece_lse in parts])
                combined = lses.logsumexp(0)
                weights = torch.where(lses == -torch.inf, 0, (lses - combined).exp())
                out[rows, head] = sum(w[:, None] * part for w, (_, part, _) in zip(weights, parts, strict=True))
                lse[head, rows] = combined
    expected, expected_lse = attention_reference(q[None], k[None], v[None], causal=True, layout=layout)
    torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_partial_gradients_add_up(name):
    """dv over the columns: an item adds what its listed blocks of queries give."""
    layout = some_layouts("cpu")[name]
    weights = torch.rand(layout.seqlen_q, layout.seqlen_k, dtype=torch.float64)
    dout = torch.randn(layout.seqlen_q, 8, dtype=torch.float64)
    schedule, size = layout.schedule(2, transposed=True), layout.block_size
    dv = torch.zeros(layout.num_heads, layout.seqlen_k, 8, dtype=torch.float64)
    for line, first, last, _ in items_of(schedule):
        head, column = divmod(line, schedule.lines_per_head)
        keys = slice(column * size, (column + 1) * size)
        for block in layout.col_index[first:last].tolist():
            queries = slice(block * size, (block + 1) * size)
            dv[head, keys] += weights[queries, keys].T @ dout[queries]
    torch.testing.assert_close(dv, (weights * layout.token_mask()).transpose(1, 2) @ dout)


def test_sizes_follow_the_listed_blocks():
    """64K tokens, one global block: 1,024 rows of 6 blocks and one of 1,024, which alone is cut."""
    layout = layouts.local_global(2**16, 128, 64, block_size=64)
    schedule = layout.schedule(32)
    assert 1024 + 31 <= schedule.max_items <= 1024 + 31 + 200
    assert schedule.slot_start[-1] == 32 <= schedule.max_slots <= 500
    assert layout.schedule(1024).max_slots == 0


def test_schedules_are_remembered(device):
    layout = layouts.local(300, 64, block_size=64, device=device)
    with torch.inference_mode():
        schedule = layout.schedule(2)
    assert layout.schedule(2) is schedule and not schedule.line.is_inference()
    assert layout.schedule(3) is not schedule and layout.schedule(2, transposed=True) is not schedule
    with pytest.raises(ValueError, match="max_blocks must be a positive number of listed blocks, got 0"):
        layout.schedule(0)
