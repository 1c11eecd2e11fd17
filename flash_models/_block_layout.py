# SPDX-License-Identifier: Apache-2.0
"""`BlockLayout`, the lists of blocks that the kernels walk, and how they are made from a mask of blocks."""

import dataclasses

import torch

from ._layout_ops import block_lists
from ._schedule import make_schedule, piece_size

BLOCK_SIZES = (64, 128)
# Fields of a BlockLayout that the ops take, by name. Fields, because torch.compile cannot call a method of what is a
# constant of the graph.
LISTS = ("row_start", "row_index", "col_start", "col_index", "row_items", "col_items")
MAX_BLOCKS = 2**31  # the lists count in int32


def listed_blocks(row_start, row_index, num_key_blocks):
    """Lists, as in `BlockLayout`, as a mask of blocks: bool (Hl, nq, num_key_blocks)."""
    first, end = row_start[:, :-1, None], row_start[:, 1:, None]
    entry = first + torch.arange(num_key_blocks, dtype=torch.int32, device=row_start.device)
    # places past the end of a row go to one extra column
    block = torch.where(entry < end, row_index[entry.clamp(max=row_index.numel() - 1)], num_key_blocks)
    mask = torch.zeros(*block.shape[:2], num_key_blocks + 1, dtype=torch.bool, device=row_start.device)
    return mask.scatter_(2, block.long(), True)[..., :-1]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLayout:
    """Lists of the blocks of the attention matrix that are computed, per row of blocks and per column of blocks.

    nq = ceil(seqlen_q / block_size), nk = ceil(seqlen_k / block_size), and Hl is 1 (one pattern for all heads) or the
    number of heads. The key blocks of query block i of head h are `row_index[row_start[h, i] : row_start[h, i + 1]]`,
    ascending; the query blocks of key block j are `col_index[col_start[h, j] : col_start[h, j + 1]]`, ascending. Heads
    with one pattern may share its lists, and entries that no row names are spare. A row or column may list nothing.
    """

    block_size: int
    seqlen_q: int
    seqlen_k: int
    row_start: torch.Tensor  # int32 (Hl, nq + 1)
    row_index: torch.Tensor  # int32 (at least the number of listed blocks,)
    col_start: torch.Tensor  # int32 (Hl, nk + 1)
    col_index: torch.Tensor  # int32 (as row_index,)
    max_listed: int  # listed blocks of all Hl heads together, or more: what the host knows without asking the device
    names: tuple[str, ...] = ("block mask",)  # the pattern and its parameters, for figures; one, or one per head
    full: bool = False  # known to list every block, so that it hides nothing: attention is then dense
    row_items: torch.Tensor | None = None  # on CUDA, see `with_work_items`
    col_items: torch.Tensor | None = None

    @property
    def num_heads(self):
        """Hl: 1 or the number of heads."""
        return self.row_start.shape[0]

    @property
    def device(self):
        return self.row_start.device

    @property
    def density(self):
        """Listed blocks over all blocks, a Python float in 0..1 (waits for the device)."""
        num_blocks = self.num_heads * (self.row_start.shape[1] - 1) * (self.col_start.shape[1] - 1)
        return (self.row_start[:, -1] - self.row_start[:, 0]).sum().item() / num_blocks

    def to_dense(self):
        """The pattern as a mask of blocks: bool (Hl, nq, nk)."""
        return listed_blocks(self.row_start, self.row_index, self.col_start.shape[1] - 1)

    def token_mask(self):
        """The pattern as a mask of tokens: bool (Hl, seqlen_q, seqlen_k). Quadratic memory, for fallbacks and tests."""
        mask = self.to_dense().repeat_interleave(self.block_size, 1).repeat_interleave(self.block_size, 2)
        return mask[:, : self.seqlen_q, : self.seqlen_k]

    def plot(self, path):
        """Draw the pattern, heads that differ side by side, into the image file `path`. Needs matplotlib."""
        from ._plot import draw_layout

        draw_layout(self, path)


def work_items(layout, transposed=False):
    """The rows (`transposed`: columns) of `layout` in pieces, as of `make_schedule`."""
    start, other = (layout.col_start, layout.row_start) if transposed else (layout.row_start, layout.col_start)
    max_blocks = piece_size(start.shape[0] * (start.shape[1] - 1), layout.max_listed)
    return make_schedule(start, max_blocks, max_length=other.shape[1] - 1, max_listed=layout.max_listed)


def with_work_items(layout):
    """`layout` with what the CUDA kernels hand out, where it is on CUDA. What makes a BlockLayout ends with this."""
    if layout.device.type != "cuda":
        return layout
    rows = work_items(layout)
    columns = rows if layout.col_start is layout.row_start else work_items(layout, transposed=True)
    return dataclasses.replace(layout, row_items=rows, col_items=columns)


def check_length(name, length):
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"{name} must be a positive number of tokens, got {length!r}")


def check_block_size(block_size):
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")


def check_count(name, value):
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")


def block_shape(seqlen_q, seqlen_k, block_size, heads=1):
    """(heads, nq, nk) of a layout for these lengths in tokens; ValueError if the lists could not count the blocks."""
    shape = (heads, -(-seqlen_q // block_size), -(-seqlen_k // block_size))
    if shape[0] * shape[1] * shape[2] >= MAX_BLOCKS:
        raise ValueError(
            f"the layout would have {heads} x {shape[1]} x {shape[2]} blocks of {block_size} tokens (heads x query "
            "blocks x key blocks), expected fewer than 2^31: use blocks of 128, one pattern for all heads or shorter "
            "sequences"
        )
    return shape


def layout_of_mask(
    mask, seqlen_q, seqlen_k, block_size, *, max_listed=None, symmetric=False, name="block mask", full=False,
    reach=-1, global_blocks=0,
):  # fmt: skip
    """The layout that lists the True blocks of `mask`, bool (Hl, nq, nk), those at most `reach` blocks from the
    diagonal, and the first `global_blocks` rows and columns.

    max_listed: an upper bound of their number; all blocks if None. `symmetric`: the mask is its own transpose, so that
    rows and columns share their lists. `full`: all blocks are listed.
    """
    max_listed = mask.numel() if max_listed is None else min(max_listed, mask.numel())
    rows = block_lists(mask, max_listed, False, reach, global_blocks)
    columns = rows if symmetric else block_lists(mask, max_listed, True, reach, global_blocks)
    return with_work_items(BlockLayout(block_size, seqlen_q, seqlen_k, *rows, *columns, max_listed, (name,), full))
