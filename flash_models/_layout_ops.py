# SPDX-License-Identifier: Apache-2.0
"""The ops that make block layouts: a mask of random blocks, lists from a mask, and work items from lists.

Here in plain PyTorch, for CPUs and for libraries without CUDA kernels; kernels/layout has the same for CUDA, where
these would be some seventy kernels. Either way without a sort and without waiting for the device.

block_lists: lists, as in `BlockLayout`, of the True blocks of a mask, bool (Hl, rows, cols), of the blocks at most
`reach` from the diagonal, and of the first `global_blocks` rows and columns; at most `max_listed` of them. Of rows of
blocks, or with `transposed` of columns. work_items: as of `make_schedule`. random_blocks: those of `bigbird`, bool
(n, n), outside of band and global blocks.
"""

import torch
import torch.nn.functional as F

from ._library import fragment, no_kernel_reason


def band(rows, cols, reach, device):
    """bool (rows, cols): numbers at most `reach` apart."""
    row = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
    col = torch.arange(cols, dtype=torch.int32, device=device)
    return (row - col).abs_() <= reach


def _block_lists(mask, max_listed, transposed, reach, global_blocks):
    """A scan and a binary search: what is not listed costs one byte and one int32 of scratch memory."""
    mask = mask.transpose(1, 2) if transposed else mask
    heads, rows, cols = mask.shape
    if reach >= 0 or global_blocks:
        beside = band(rows, cols, reach, mask.device)
        beside[:global_blocks] = True
        beside[:, :global_blocks] = True
        mask = mask | beside
    listed = mask.flatten().cumsum(0, dtype=torch.int32)  # blocks listed up to and with each one
    row_ends = listed.view(heads * rows, cols)[:, -1]
    start = F.pad(row_ends, (1, 0)).unfold(0, rows + 1, rows).contiguous()
    number = torch.arange(1, max_listed + 1, dtype=torch.int32, device=mask.device)
    # the n-th listed block is the first up to which n are listed; past the last one this gives a multiple of cols
    index = torch.searchsorted(listed, number, out_int32=True) % cols
    return start, index


def _work_items(start, max_blocks, max_partial):
    lines = start.shape[0] * (start.shape[1] - 1)
    begin, length = start[:, :-1].flatten().long(), start.diff(dim=1).flatten().long()
    pieces = ((length + max_blocks - 1) // max_blocks).clamp(min=1)
    partial = torch.where(pieces > 1, pieces, 0)
    whole = (pieces > 1) & (partial.cumsum(0) > max_partial)  # lines after the last that fits, longer ones or not
    pieces, partial = pieces.masked_fill(whole, 1), partial.masked_fill(whole, 0)
    item_end, slot_end = pieces.cumsum(0), partial.cumsum(0)

    item = torch.arange(lines + max_partial, device=start.device)
    line = torch.searchsorted(item_end, item, right=True)
    spare = line == lines
    line = line.clamp(max=lines - 1)
    of_line = pieces[line]
    piece = item - (item_end[line] - of_line)
    first = begin[line] + length[line] * piece // of_line
    last = begin[line] + length[line] * (piece + 1) // of_line
    slot = torch.where(of_line == 1, -1, slot_end[line] - of_line + piece)
    items = line.masked_fill(spare, -1), first.masked_fill(spare, 0), last.masked_fill(spare, 0)
    return torch.stack([*items, slot.masked_fill(spare, -1)], 1).int()


def _mixed(x):
    """32 bits that all depend on all of the 32 bits of `x`, an int or an int64 tensor: Wellons' hash `lowbias32`."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _random_blocks(like, n, reach, global_blocks, n_random, seed):
    """A row's free blocks are cut into `n_random` parts of equal length and one block is drawn from each: distinct
    blocks without a sort or a loop, and every free block equally likely up to the rounding of the parts."""
    row = torch.arange(n, device=like.device)[:, None]
    # the free blocks are [global_blocks, low) and [high, n)
    low = (row - reach).clamp(min=global_blocks)
    high = (row + reach + 1).clamp(max=n).maximum(low)
    before_band = low - global_blocks
    free = before_band + n - high
    part = torch.arange(n_random, device=like.device)
    begin, end = free * part // max(n_random, 1), free * (part + 1) // max(n_random, 1)
    word = _mixed((row * n_random + part) ^ _mixed(seed))
    drawn = begin + word % (end - begin).clamp(min=1)
    block = torch.where(drawn < before_band, global_blocks + drawn, high + drawn - before_band)
    mask = torch.zeros(n, n + 1, dtype=torch.bool, device=like.device)  # the last column takes what is no block
    return mask.scatter_(1, torch.where(begin < end, block, n), True)[:, :n].contiguous()


def _with_plain(op, plain):
    """`op` with `plain` for every device that has no kernel, a GPU older than those of the library included."""
    fragment.impl(op.name().removeprefix("flash_models::"), plain, "CompositeExplicitAutograd")

    def call(tensor, *arguments):
        too_old = tensor.is_cuda and torch.cuda.is_available() and no_kernel_reason(tensor.device) is not None
        return (plain if too_old else op)(tensor, *arguments)

    return call


block_lists = _with_plain(torch.ops.flash_models.block_lists.default, _block_lists)
random_blocks = _with_plain(torch.ops.flash_models.random_blocks.default, _random_blocks)
work_items = _with_plain(torch.ops.flash_models.work_items.default, _work_items)


@torch.library.register_fake("flash_models::block_lists")
def _(mask, max_listed, transposed, reach, global_blocks):
    lines = mask.shape[2 if transposed else 1]
    start = mask.new_empty(mask.shape[0], lines + 1, dtype=torch.int32)
    return start, mask.new_empty(max_listed, dtype=torch.int32)


@torch.library.register_fake("flash_models::random_blocks")
def _(like, n, reach, global_blocks, n_random, seed):
    return like.new_empty(n, n)


@torch.library.register_fake("flash_models::work_items")
def _(start, max_blocks, max_partial):
    return start.new_empty(start.shape[0] * (start.shape[1] - 1) + max_partial, 4)
