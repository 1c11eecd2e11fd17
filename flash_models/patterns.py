# SPDX-License-Identifier: Apache-2.0
"""The block-sparse patterns. Users find them in `flash_models.layouts`.

Each is a function from sizes to a `BlockLayout`. What a pattern says of tokens is rounded out to whole blocks, and the
last block of a sequence may be cut off by its end. Layouts are built on `device` without a sort and without waiting for
the device, and are the same on every device.
"""

import torch
import torch.nn.functional as F

from ._block_layout import block_shape, check_block_size, check_count, check_length, layout_of_mask
from ._layout_ops import band, random_blocks


def from_block_mask(mask, seqlen_q, seqlen_k, block_size=128):
    """The layout that lists the True blocks of `mask`, bool (nq, nk) or, a pattern for each head, (H, nq, nk)."""
    check_block_size(block_size)
    check_length("seqlen_q", seqlen_q)
    check_length("seqlen_k", seqlen_k)
    heads = mask.shape[0] if mask.dim() == 3 else 1
    shape = block_shape(seqlen_q, seqlen_k, block_size, heads)
    if mask.dtype != torch.bool or mask.dim() not in (2, 3) or heads == 0 or tuple(mask.shape[-2:]) != shape[1:]:
        raise ValueError(
            f"mask must be a bool tensor of shape {shape[1:]} or (heads, {shape[1]}, {shape[2]}), one entry per "
            f"block of {block_size} x {block_size} tokens of seqlen_q={seqlen_q}, seqlen_k={seqlen_k}; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return layout_of_mask(mask.view(shape), seqlen_q, seqlen_k, block_size)


def dense(seqlen_q, seqlen_k=None, *, block_size=128, device=None):
    """Every block: attention without sparsity."""
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    check_block_size(block_size)
    check_length("seqlen_q", seqlen_q)
    check_length("seqlen_k", seqlen_k)
    mask = torch.ones(block_shape(seqlen_q, seqlen_k, block_size), dtype=torch.bool, device=device)
    symmetric = mask.shape[1] == mask.shape[2]
    return layout_of_mask(mask, seqlen_q, seqlen_k, block_size, symmetric=symmetric, name="dense", full=True)


def _block_count(seqlen, block_size):
    check_block_size(block_size)
    check_length("seqlen", seqlen)
    return block_shape(seqlen, seqlen, block_size)[1]


def _numbers(seqlen, block_size, device):
    """Numbers of the blocks of a sequence, int32, as a column (n, 1) and as a row (n,)."""
    block = torch.arange(_block_count(seqlen, block_size), dtype=torch.int32, device=device)
    return block[:, None], block


def _reach(window, block_size):
    """How many blocks apart two tokens at most `window` apart may be."""
    check_count("window", window)
    # the nearest tokens of blocks n apart (n >= 1) are (n - 1) * block_size + 1 apart
    return -(-window // block_size)


def _global_blocks(n_global, block_size):
    check_count("n_global", n_global)
    return -(-n_global // block_size)


def _square_layout(mask, global_blocks, blocks_per_row, seqlen, block_size, *, reach=-1, **options):
    """The layout of `mask`, bool (n, n), with a band of `reach` blocks to either side and with global blocks.

    `blocks_per_row` bounds the rows of the mask and the band together.
    """
    n = mask.shape[0]
    global_blocks = min(global_blocks, n)
    max_listed = global_blocks * n + (n - global_blocks) * min(global_blocks + blocks_per_row, n)
    options["full"] = max(reach + 1, global_blocks) >= n
    options.update(reach=reach, global_blocks=global_blocks)
    return layout_of_mask(mask[None], seqlen, seqlen, block_size, max_listed=max_listed, **options)


def local(seqlen, window, *, block_size=128, device=None):
    """A band: every pair of tokens at most `window` apart, |i - j| <= window, rounded out to blocks."""
    return local_global(seqlen, window, 0, block_size=block_size, device=device)


def local_global(seqlen, window, n_global, *, block_size=128, device=None):
    """Longformer's pattern (arXiv 2004.05150): a band, and the first `n_global` tokens see and are seen by all.

    Both are rounded out to blocks: see `local`.
    """
    n = _block_count(seqlen, block_size)
    reach, global_blocks = _reach(window, block_size), _global_blocks(n_global, block_size)
    name = f"local_global, window {window}, {n_global} global tokens" if n_global else f"local, window {window}"
    mask = torch.zeros((), dtype=torch.bool, device=device).expand(n, n)
    return _square_layout(
        mask, global_blocks, 2 * reach + 1, seqlen, block_size, reach=reach, symmetric=True, name=name
    )


def bigbird(seqlen, window, n_global, n_random, seed=0, *, block_size=128, device=None):
    """BigBird's pattern (arXiv 2007.14062): `local_global`, and `n_random` random blocks for each block of queries.

    The random blocks lie outside of the band and the global blocks, where there are as many. They are a function of
    `seed`, the number of blocks and the other arguments. Give heads seeds of their own with `per_head`.
    """
    n = _block_count(seqlen, block_size)
    reach, global_blocks = _reach(window, block_size), _global_blocks(n_global, block_size)
    check_count("n_random", n_random)
    check_count("seed", seed)
    like = torch.empty(0, dtype=torch.bool, device=device)
    mask = random_blocks(like, n, reach, min(global_blocks, n), min(n_random, n), seed & 0xFFFFFFFF)
    name = f"bigbird, window {window}, {n_global} global tokens, {n_random} random blocks, seed {seed}"
    per_row = 2 * reach + 1 + n_random
    return _square_layout(mask, global_blocks, per_row, seqlen, block_size, reach=reach, name=name)


def check_stride(stride, block_size):
    if not isinstance(stride, int) or isinstance(stride, bool) or stride < 1 or stride % block_size:
        raise ValueError(
            f"stride must be a positive multiple of block_size {block_size}, so that every stride-th token is in every "
            f"n-th block; got {stride!r}"
        )


def strided(seqlen, stride, *, block_size=128, device=None):
    """The strided pattern of the Sparse Transformer (arXiv 1904.10509): every `stride`-th token, and all in between.

    Queries see the keys at most `stride` tokens away, as in `local`, and those a multiple of `stride` away: any two
    tokens are connected over one third. `stride` is a multiple of `block_size`, best near sqrt(seqlen * block_size).
    Both heads of the paper in one; without `causal` it looks both ways.
    """
    row, col = _numbers(seqlen, block_size, device)
    check_stride(stride, block_size)
    step = stride // block_size
    mask = (row - col) % step == 0
    per_row = 2 * step + 1 + len(col) // step
    name = f"strided, stride {stride}"
    return _square_layout(mask, 0, per_row, seqlen, block_size, reach=step, symmetric=True, name=name)


def butterfly(seqlen, window=0, n_global=0, *, block_size=128, device=None):
    """The fixed pattern of block-sparse FlashAttention (arXiv 2205.14135): Pixelated Butterfly (arXiv 2112.00029).

    A flat block butterfly, which joins blocks whose numbers differ in at most one bit: the union of the factors of a
    Fourier transform over blocks, so that ceil(log2(n)) layers connect any two of n blocks. With it a band and global
    tokens, the paper's local and low-rank parts, as in `local_global`.
    """
    row, col = _numbers(seqlen, block_size, device)
    reach, global_blocks = _reach(window, block_size), _global_blocks(n_global, block_size)
    bits = row ^ col
    mask = (bits & (bits - 1)) == 0
    per_row = 2 * reach + 1 + (len(col) - 1).bit_length()
    name = f"butterfly, window {window}, {n_global} global tokens"
    return _square_layout(mask, global_blocks, per_row, seqlen, block_size, reach=reach, symmetric=True, name=name)


def _tile_shape(height, width, block_size):
    """(rows, columns) of pixels in one block: 8 x 8 or 8 x 16."""
    check_block_size(block_size)
    check_length("height", height)
    check_length("width", width)
    tile = (8, block_size // 8)
    if height % tile[0] or width % tile[1]:
        raise ValueError(
            f"block_size {block_size} stores an image in tiles of {tile[0]} x {tile[1]} pixels (height x width), "
            f"which do not divide {height} x {width}; pad or crop the image"
        )
    return tile


def tile_order(height, width, block_size, device=None):
    """Order in which `grid_2d` expects the pixels of an image: int64 (height * width,), the raster index at each place.

    One block of tokens is one tile of the image, 8 x 8 pixels for block size 64 and 8 rows x 16 columns for 128. Tiles
    follow each other in raster order, and so do the pixels of a tile: `tokens = image.flatten()[tile_order(...)]`.
    """
    rows, cols = _tile_shape(height, width, block_size)
    raster = torch.arange(height * width, device=device).view(height // rows, rows, width // cols, cols)
    return raster.transpose(1, 2).reshape(-1)


def grid_2d(height, width, radius, n_global=0, *, block_size=64, device=None):
    """Neighbourhoods of an image whose pixels are stored in `tile_order`, behind `n_global` global tokens.

    A tile sees the (2 * radius + 1)^2 tiles around it, and the global tokens, a multiple of `block_size`, see and are
    seen by all. seqlen = n_global + height * width.
    """
    rows, cols = _tile_shape(height, width, block_size)
    check_count("radius", radius)
    check_count("n_global", n_global)
    if n_global % block_size:
        raise ValueError(
            f"n_global must be a multiple of block_size {block_size}, so that tiles stay aligned with blocks; "
            f"got {n_global}"
        )
    seqlen, global_blocks = n_global + height * width, n_global // block_size
    block_shape(seqlen, seqlen, block_size)
    down, across = height // rows, width // cols
    near = band(max(down, across), max(down, across), radius, device)
    near = near[:down, None, :down, None] & near[None, :across, None, :across]
    mask = near.view(near.shape[0] * near.shape[1], -1)
    if global_blocks:
        mask = F.pad(mask, (global_blocks, 0, global_blocks, 0))
    name = f"grid_2d, {height} x {width} pixels, radius {radius}, {n_global} global tokens"
    per_row = (2 * radius + 1) ** 2
    return _square_layout(mask, global_blocks, per_row, seqlen, block_size, symmetric=True, name=name)
