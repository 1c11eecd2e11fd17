# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention patterns: which blocks of keys each block of queries sees.

Each pattern is a function that returns a `BlockLayout`. A pattern that speaks of tokens is rounded out to whole blocks.
Layouts are built on `device` without a sort and without waiting for the device.
"""

import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ._cache import cache_tensors

BLOCK_SIZES = (64, 128)


def listed_blocks(row_start, row_index, num_key_blocks):
    """Block lists, as in `BlockLayout`, as a mask of blocks: bool (Hl, nq, num_key_blocks)."""
    heads, rows = row_start.shape[0], row_start.shape[1] - 1
    entry = torch.arange(row_index.numel(), device=row_index.device, dtype=torch.int32)
    row = torch.searchsorted(row_start[:, 1:].flatten().contiguous(), entry, right=True)
    num_blocks = heads * rows * num_key_blocks
    # spare entries, which lie past the last row, all go to one extra place at the end
    place = torch.where(row < heads * rows, row * num_key_blocks + row_index, num_blocks)
    mask = torch.zeros(num_blocks + 1, dtype=torch.bool, device=row_index.device)
    return mask.index_fill_(0, place, True)[:-1].view(heads, rows, num_key_blocks)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Lists of the blocks of the attention matrix that are computed, per row of blocks and per column of blocks.

    nq = ceil(seqlen_q / block_size), nk = ceil(seqlen_k / block_size), and Hl is 1 (one pattern for all heads) or the
    number of heads. The key blocks of query block i of head h are `row_index[row_start[h, i] : row_start[h, i + 1]]`,
    ascending; the query blocks of key block j are `col_index[col_start[h, j] : col_start[h, j + 1]]`, ascending.
    """

    block_size: int
    seqlen_q: int
    seqlen_k: int
    row_start: torch.Tensor  # int32 (Hl, nq + 1)
    row_index: torch.Tensor  # int32 (Hl * nq * nk,), the entries past row_start[-1, -1] are spare
    col_start: torch.Tensor  # int32 (Hl, nk + 1)
    col_index: torch.Tensor  # int32 (Hl * nk * nq,)
    name: str = "block mask"  # the pattern and its parameters, for figures

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
        return self.row_start[-1, -1].item() / num_blocks

    def to_dense(self):
        """The pattern as a mask of blocks: bool (Hl, nq, nk)."""
        return listed_blocks(self.row_start, self.row_index, self.col_start.shape[1] - 1)

    def token_mask(self):
        """The pattern as a mask of tokens: bool (Hl, seqlen_q, seqlen_k). Quadratic memory, for fallbacks and tests."""
        mask = self.to_dense().repeat_interleave(self.block_size, 1).repeat_interleave(self.block_size, 2)
        return mask[:, : self.seqlen_q, : self.seqlen_k]

    def plot(self, path):
        """Draw the pattern (of the first head) into the image file `path`, axes in tokens. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.5, 5.5), layout="constrained")
        axes = figure.add_subplot()
        dense = self.to_dense()[0].cpu().numpy()
        extent = (0, dense.shape[1] * self.block_size, dense.shape[0] * self.block_size, 0)
        axes.imshow(dense, cmap="Blues", vmin=0, vmax=1.3, extent=extent, interpolation="nearest")
        if max(dense.shape) <= 64:
            axes.set_xticks(range(0, extent[1] + 1, self.block_size), minor=True)
            axes.set_yticks(range(0, extent[2] + 1, self.block_size), minor=True)
            axes.grid(which="minor", color="white", linewidth=0.5)
            axes.tick_params(which="minor", length=0)
        axes.set_xlabel("key (tokens)")
        axes.set_ylabel("query (tokens)")
        facts = f"{self.density:.1%} of all blocks, block size {self.block_size}"
        if self.num_heads > 1:
            facts += f", head 0 of {self.num_heads}"
        axes.set_title(f"{self.name}\n{facts}", fontsize=11)
        figure.savefig(path, dpi=150)


def _check_length(name, length):
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"{name} must be a positive number of tokens, got {length!r}")


def _check_block_size(block_size):
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")


def _check_count(name, value):
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")


def _lists(mask):
    """CSR of a mask, bool (Hl, rows, cols): (start int32 (Hl, rows + 1), index int32 (Hl * rows * cols,))."""
    heads, rows, cols = mask.shape
    starts = F.pad(mask.sum(-1).flatten().cumsum(0), (1, 0))
    start = starts.unfold(0, rows + 1, rows).to(torch.int32).contiguous() if rows else starts.new_zeros(heads, 1)
    listed = mask.flatten()
    # the n-th listed block goes to place n, the others to one extra place at the end
    place = torch.where(listed, listed.cumsum(0) - 1, listed.numel())
    number = torch.arange(cols, device=mask.device, dtype=torch.int32).expand(heads, rows, cols).reshape(-1)
    index = torch.zeros(listed.numel() + 1, dtype=torch.int32, device=mask.device).scatter_(0, place, number)
    return start, index[:-1].contiguous()


def _from_mask(mask, seqlen_q, seqlen_k, block_size, **name):
    row_start, row_index = _lists(mask)
    col_start, col_index = _lists(mask.transpose(1, 2))
    return BlockLayout(block_size, seqlen_q, seqlen_k, row_start, row_index, col_start, col_index, **name)


def from_block_mask(mask, seqlen_q, seqlen_k, block_size=128):
    """The layout that lists the True blocks of `mask`, bool (nq, nk) or, a pattern for each head, (H, nq, nk)."""
    _check_block_size(block_size)
    _check_length("seqlen_q", seqlen_q)
    _check_length("seqlen_k", seqlen_k)
    expected = (-(-seqlen_q // block_size), -(-seqlen_k // block_size))
    if mask.dtype != torch.bool or mask.dim() not in (2, 3) or tuple(mask.shape[-2:]) != expected:
        raise ValueError(
            f"mask must be a bool tensor of shape {expected} or (heads, {expected[0]}, {expected[1]}), one entry per "
            f"block of {block_size} x {block_size} tokens of seqlen_q={seqlen_q}, seqlen_k={seqlen_k}; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return _from_mask(mask if mask.dim() == 3 else mask[None], seqlen_q, seqlen_k, block_size)


def dense(seqlen_q, seqlen_k=None, *, block_size=128, device=None):
    """Every block: attention without sparsity."""
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    _check_block_size(block_size)
    _check_length("seqlen_q", seqlen_q)
    _check_length("seqlen_k", seqlen_k)
    shape = (1, -(-seqlen_q // block_size), -(-seqlen_k // block_size))
    return _from_mask(torch.ones(shape, dtype=torch.bool, device=device), seqlen_q, seqlen_k, block_size, name="dense")


def local(seqlen, window, *, block_size=128, device=None):
    """A band: every pair of tokens at most `window` apart, |i - j| <= window, rounded out to blocks."""
    return local_global(seqlen, window, 0, block_size=block_size, device=device)


def local_global(seqlen, window, n_global, *, block_size=128, device=None):
    """Longformer's pattern (arXiv 2004.05150): a band, and the first `n_global` tokens see and are seen by all.

    Both are rounded out to blocks: see `local`.
    """
    _check_block_size(block_size)
    _check_length("seqlen", seqlen)
    _check_count("window", window)
    _check_count("n_global", n_global)
    block = torch.arange(-(-seqlen // block_size), device=device)
    is_global = block < -(-n_global // block_size)
    # the nearest tokens of blocks n apart (n >= 1) are (n - 1) * block_size + 1 apart
    near = (block[:, None] - block).abs() <= -(-window // block_size)
    name = f"local_global, window {window}, {n_global} global tokens" if n_global else f"local, window {window}"
    return _from_mask((near | is_global[:, None] | is_global)[None], seqlen, seqlen, block_size, name=name)


def _tile_shape(height, width, block_size):
    """(rows, columns) of pixels in one block: 8 x 8 or 8 x 16."""
    _check_block_size(block_size)
    _check_length("height", height)
    _check_length("width", width)
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
    _check_count("radius", radius)
    _check_count("n_global", n_global)
    if n_global % block_size:
        raise ValueError(
            f"n_global must be a multiple of block_size {block_size}, so that tiles stay aligned with blocks; "
            f"got {n_global}"
        )
    tile = torch.arange((height // rows) * (width // cols), device=device)
    y, x = tile // (width // cols), tile % (width // cols)
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    global_blocks = n_global // block_size
    mask = F.pad(near, (global_blocks, 0, global_blocks, 0), value=True)
    seqlen = n_global + height * width
    name = f"grid_2d, {height} x {width} pixels, radius {radius}, {n_global} global tokens"
    return _from_mask(mask[None], seqlen, seqlen, block_size, name=name)


# pattern -> (required fields, optional fields) of `config.block_sparse`
_PATTERN_FIELDS = {
    "dense": ((), ("block_size",)),
    "local": (("window",), ("block_size",)),
    "local_global": (("window", "global"), ("block_size",)),
    "grid_2d": (("radius",), ("global", "height", "width", "block_size")),
}


def check_config(block_sparse):
    """Raise ValueError unless `block_sparse` names a pattern and exactly its fields; see `from_config`."""
    if not isinstance(block_sparse, dict) or "pattern" not in block_sparse:
        raise ValueError(
            'block_sparse must be a dict with a "pattern", such as '
            f'{{"pattern": "local_global", "window": 1024, "global": 128}}; got {block_sparse!r}'
        )
    pattern = block_sparse["pattern"]
    if pattern not in _PATTERN_FIELDS:
        raise ValueError(f"unknown block_sparse pattern {pattern!r}; known patterns: {', '.join(_PATTERN_FIELDS)}")
    required, optional = _PATTERN_FIELDS[pattern]
    got = set(block_sparse) - {"pattern"}
    if not set(required) <= got or not got <= {*required, *optional}:
        raise ValueError(
            f"block_sparse pattern {pattern!r} takes the fields {list(required)} and, optionally, {list(optional)}; "
            f"got {sorted(got)}"
        )
    if ("height" in got) != ("width" in got):
        raise ValueError("block_sparse pattern 'grid_2d' takes both of height and width, or neither for a square image")
    for field in got - {"block_size"}:
        _check_count(f"block_sparse field {field!r}", block_sparse[field])
    _check_block_size(block_sparse.get("block_size", 128))


def from_config(block_sparse, seqlen_q, seqlen_k, device=None):
    """The layout that a model's `config.block_sparse` describes, for sequences of `seqlen_q` = `seqlen_k` tokens.

    `{"pattern": name, ...}` with the arguments of the pattern's function as further fields, `global` for `n_global`.
    grid_2d may leave out height and width: then the tokens behind the global ones are a square image. Layouts are
    cached, so asking again is free.
    """
    check_config(block_sparse)
    if block_sparse["pattern"] != "dense" and seqlen_q != seqlen_k:
        raise ValueError(
            f"pattern {block_sparse['pattern']!r} needs queries and keys of one length, "
            f"got seqlen_q={seqlen_q}, seqlen_k={seqlen_k}"
        )
    return _cached_layout(json.dumps(block_sparse, sort_keys=True), seqlen_q, seqlen_k, torch.device(device or "cpu"))


@cache_tensors
def _cached_layout(block_sparse_json, seqlen_q, seqlen_k, device):
    fields = json.loads(block_sparse_json)
    pattern = fields.pop("pattern")
    if pattern == "dense":
        return dense(seqlen_q, seqlen_k, device=device, **fields)
    if pattern == "local":
        return local(seqlen_q, device=device, **fields)
    n_global = fields.pop("global", 0)
    if pattern == "local_global":
        return local_global(seqlen_q, n_global=n_global, device=device, **fields)
    image = f"an image of {fields['height']} x {fields['width']} pixels" if "height" in fields else "a square image"
    side = math.isqrt(max(seqlen_q - n_global, 0))
    fields = {"height": side, "width": side, **fields}
    if n_global + fields["height"] * fields["width"] != seqlen_q:
        raise ValueError(
            f"block_sparse pattern 'grid_2d' takes {n_global} global tokens followed by {image}, got {seqlen_q} tokens"
        )
    return grid_2d(n_global=n_global, device=device, **fields)
