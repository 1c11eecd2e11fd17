# SPDX-License-Identifier: Apache-2.0
"""Schedules of block layouts: every listed block is one item's, and partial results combine to the exact ones."""

import pytest
import torch

from flash_models import layouts
from flash_models._block_layout import work_items
from flash_models._schedule import make_schedule
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


def schedule_of(layout, max_blocks, transposed=False):
    """The items, cut wherever a line is longer than max_blocks, and how many lines there are."""
    start, other = (layout.col_start, layout.row_start) if transposed else (layout.row_start, layout.col_start)
    sizes = {"max_length": other.shape[1] - 1, "max_listed": layout.max_listed}
    items = make_schedule(start, max_blocks, **sizes, max_partial=10**6)
    return items, start.shape[0] * (start.shape[1] - 1)


def used(items):
    """(line, first, last, slot) of every item that is not spare."""
    assert items.dtype == torch.int32 and items.shape[1] == 4
    rows = items.tolist()
    real = [row for row in rows if row[0] >= 0]
    assert rows[len(real) :] == [[-1, 0, 0, -1]] * (len(rows) - len(real))  # the spare ones
    return real


@pytest.mark.parametrize("max_blocks", [1, 2, 3, 8, 1000])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("name", NAMES)
def test_every_line_is_cut_into_its_pieces(device, name, transposed, max_blocks):
    layout = some_layouts(device)[name]
    items, count = schedule_of(layout, max_blocks, transposed)
    start = (layout.col_start if transposed else layout.row_start).tolist()
    lines = [(head[i], head[i + 1]) for head in start for i in range(len(head) - 1)]
    assert len(lines) == count

    pieces, slots = {}, {}
    for line, first, last, slot in used(items):
        pieces.setdefault(line, []).append((first, last))
        slots.setdefault(line, []).append(slot)
    assert list(pieces) == list(range(count))
    partial = [slot for line in slots.values() for slot in line if slot >= 0]
    assert partial == list(range(len(partial))) and len(partial) <= len(items) - count
    for line, (begin, end) in enumerate(lines):
        bounds = [begin, *(last for _, last in pieces[line])]
        assert pieces[line] == list(zip(bounds, bounds[1:], strict=False)) and bounds[-1] == end  # without gaps
        lengths = [last - first for first, last in pieces[line]]
        assert max(lengths) <= max_blocks and max(lengths) - min(lengths) <= 1
        assert len(lengths) == max(1, -(-(end - begin) // max_blocks))
        assert (slots[line] == [-1]) == (len(lengths) == 1)


def test_what_exceeds_the_partial_results_stays_whole():
    start = torch.tensor([[0, 7, 8, 17, 20]], dtype=torch.int32)  # 7, 1, 9 and 3 blocks
    cut = make_schedule(start, 2, max_length=9, max_listed=20, max_partial=5)
    assert cut.tolist() == [
        [0, 0, 1, 0],
        [0, 1, 3, 1],
        [0, 3, 5, 2],
        [0, 5, 7, 3],
        [1, 7, 8, -1],
        [2, 8, 17, -1],
        [3, 17, 20, -1],
        *[[-1, 0, 0, -1]] * 2,
    ]


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
    table, lines = schedule_of(layout, max_blocks)
    items, lines_per_head = used(table), layout.row_start.shape[1] - 1
    for head in range(heads):
        partial = {}
        for number in torch.randperm(len(items)).tolist():
            line, first, last, slot = items[number]
            list_head, row = divmod(line, lines_per_head)
            if list_head not in (0, head) or (layout.num_heads > 1 and list_head != head):
                continue
            rows, piece, piece_lse = partial_forward(layout, q, k, v, head, row, first, last)
            if slot >= 0:
                partial.setdefault(line, []).append((slot, rows, piece, piece_lse))
            else:
                out[rows, head], lse[head, rows] = piece, piece_lse
        for parts in partial.values():
            rows, lses = parts[0][1], torch.stack([piece_lse for *_, piece_lse in parts])
            combined = lses.logsumexp(0)
            weights = torch.where(lses == -torch.inf, 0, (lses - combined).exp())
            out[rows, head] = sum(w[:, None] * part for w, (*_, part, _) in zip(weights, parts, strict=True))
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
    items, size = schedule_of(layout, 2, transposed=True)[0], layout.block_size
    dv = torch.zeros(layout.num_heads, layout.seqlen_k, 8, dtype=torch.float64)
    for line, first, last, _ in used(items):
        head, column = divmod(line, layout.col_start.shape[1] - 1)
        keys = slice(column * size, (column + 1) * size)
        for block in layout.col_index[first:last].tolist():
            queries = slice(block * size, (block + 1) * size)
            dv[head, keys] += weights[queries, keys].T @ dout[queries]
    torch.testing.assert_close(dv, (weights * layout.token_mask()).transpose(1, 2) @ dout)


def test_sizes_follow_the_listed_blocks():
    """64K tokens, one global block: 512 rows of 6 blocks and one of 512, which alone is cut; no more scratch memory."""
    layout = layouts.local_global(2**16, 256, 128)
    items = used(work_items(layout))
    pieces = [last - first for line, first, last, slot in items if slot >= 0]
    assert sum(pieces) == 512 and 8 <= len(pieces) <= 16
    assert max(last - first for _, first, last, _ in items) == max(pieces) == -(-512 // len(pieces))
    assert len(work_items(layout)) == 512 + 64
    assert len(work_items(layouts.dense(2**14))) == 128  # equal lines: none is long
