# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention: which blocks of keys each block of queries sees.

A `BlockLayout` comes from a pattern, a function of the lengths; from patterns of the heads, `per_head`; from a mask of
blocks, `from_block_mask`; or from the dict in a model's config, `from_config`. Pass it to `attention(layout=...)`.
"""

import json
import math

import torch

from ._block_layout import BLOCK_SIZES, BlockLayout, check_block_size, check_count, listed_blocks, with_work_items
from ._cache import cache_tensors
from .patterns import (
    bigbird,
    butterfly,
    check_stride,
    dense,
    from_block_mask,
    grid_2d,
    local,
    local_global,
    strided,
    tile_order,
)

__all__ = [
    "BLOCK_SIZES",
    "BlockLayout",
    "bigbird",
    "butterfly",
    "check_config",
    "dense",
    "from_block_mask",
    "from_config",
    "grid_2d",
    "listed_blocks",
    "local",
    "local_global",
    "per_head",
    "strided",
    "tile_order",
]


def _check_repeats(num_patterns, num_heads):
    if not isinstance(num_heads, int) or num_heads < 1 or num_heads % num_patterns:
        raise ValueError(
            f"{num_patterns} patterns do not repeat over {num_heads!r} heads; expected a divisor of the heads"
        )


def per_head(layouts, num_heads=None):
    """One layout of `num_heads` heads from layouts for each: head h takes layouts[h % len(layouts)].

    num_heads: a multiple of their number, which it is if None. The layouts must be shared ones (of one head) for the
    same lengths, block size and device. Heads that take the same object share its lists.
    """
    layouts = list(layouts)
    num_heads = len(layouts) if num_heads is None else num_heads
    if not layouts or any(layout.num_heads != 1 for layout in layouts):
        raise ValueError(
            "per_head takes at least one layout, each of one pattern for all heads; got layouts of "
            f"{[layout.num_heads for layout in layouts]} heads"
        )
    kinds = {(layout.block_size, layout.seqlen_q, layout.seqlen_k, str(layout.device)) for layout in layouts}
    if len(kinds) > 1:
        raise ValueError(
            "the layouts of the heads must agree in (block_size, seqlen_q, seqlen_k, device); got "
            + " and ".join(map(str, sorted(kinds)))
        )
    _check_repeats(len(layouts), num_heads)
    distinct = list({id(layout): layout for layout in layouts}.values())
    if len(distinct) == 1:
        return distinct[0]
    of_head = [distinct.index(layouts[head % len(layouts)]) for head in range(num_heads)]

    def joined(start, index):
        """The lists one behind the other, and for each head where those of its layout begin and end."""
        offsets = [0]
        for layout in distinct:
            offsets.append(offsets[-1] + getattr(layout, index).numel())
        if offsets[-1] >= 2**31:
            raise ValueError(f"the heads' lists hold up to {offsets[-1]} blocks, expected fewer than 2^31")
        starts = [getattr(layout, start) + offset for layout, offset in zip(distinct, offsets, strict=False)]
        return torch.cat([starts[i] for i in of_head]), torch.cat([getattr(layout, index) for layout in distinct])

    rows = joined("row_start", "row_index")
    columns = (
        rows if all(layout.col_index is layout.row_index for layout in distinct) else joined("col_start", "col_index")
    )
    joint = BlockLayout(
        distinct[0].block_size,
        distinct[0].seqlen_q,
        distinct[0].seqlen_k,
        *rows,
        *columns,
        sum(distinct[i].max_listed for i in of_head),
        tuple(distinct[i].names[0] for i in of_head),
        all(layout.full for layout in distinct),
    )
    return with_work_items(joint)


# pattern -> (required fields, optional fields) of `config.block_sparse`
_PATTERN_FIELDS = {
    "dense": ((), ("block_size",)),
    "local": (("window",), ("block_size",)),
    "local_global": (("window", "global"), ("block_size",)),
    "bigbird": (("window", "global", "random"), ("seed", "block_size")),
    "strided": (("stride",), ("block_size",)),
    "butterfly": ((), ("window", "global", "block_size")),
    "grid_2d": (("radius",), ("global", "height", "width", "block_size")),
    "per_head": (("heads",), ("block_size",)),
}
_ARGUMENTS = {"global": "n_global", "random": "n_random"}  # of the patterns' functions, where a field is named shorter


def check_config(block_sparse, num_heads=None):
    """Raise ValueError unless `block_sparse` names a pattern and exactly its fields: see `from_config`.

    With `num_heads` also unless the patterns of a `per_head` repeat over that many heads.
    """
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
    block_size = block_sparse.get("block_size", 128)
    check_block_size(block_size)
    if pattern == "strided":
        check_stride(block_sparse["stride"], block_size)
    for field in got - {"block_size", "heads"}:
        check_count(f"block_sparse field {field!r}", block_sparse[field])
    if pattern == "per_head":
        _check_heads(block_sparse["heads"], block_size, num_heads)


def _check_heads(heads, block_size, num_heads):
    if not isinstance(heads, list) or not heads:
        raise ValueError(f"block_sparse field 'heads' must be a list of patterns, one for each head; got {heads!r}")
    for number, head in enumerate(heads):
        if isinstance(head, dict) and ("block_size" in head or head.get("pattern") == "per_head"):
            raise ValueError(
                f"heads[{number}] of block_sparse pattern 'per_head' must be another pattern without a block_size, "
                f"which stands beside 'heads' and holds for all; got {head!r}"
            )
        try:
            check_config({**head, "block_size": block_size} if isinstance(head, dict) else head)
        except ValueError as error:
            raise ValueError(f"heads[{number}] of block_sparse pattern 'per_head': {error}") from None
    if num_heads is not None:
        _check_repeats(len(heads), num_heads)


def from_config(block_sparse, seqlen_q, seqlen_k, device=None, num_heads=None):
    """The layout that a model's `config.block_sparse` describes, for sequences of `seqlen_q` = `seqlen_k` tokens.

    `{"pattern": name, ...}` with the arguments of the pattern's function as further fields, `global` for `n_global`
    and `random` for `n_random`. grid_2d may leave out height and width: then the tokens behind the global ones are a
    square image. `{"pattern": "per_head", "heads": [{"pattern": ...}, ...]}` gives each head its own, repeated over
    `num_heads`; the block size stands beside "heads". Layouts are cached, so asking again is free.
    """
    check_config(block_sparse, num_heads)
    pattern = block_sparse["pattern"]
    if pattern != "dense" and seqlen_q != seqlen_k:
        raise ValueError(
            f"pattern {pattern!r} needs queries and keys of one length, got seqlen_q={seqlen_q}, seqlen_k={seqlen_k}"
        )
    num_heads = num_heads if pattern == "per_head" else None  # all others are shared by the heads
    device = torch.device(device or "cpu")
    return _cached_layout(json.dumps(block_sparse, sort_keys=True), seqlen_q, seqlen_k, device, num_heads)


@cache_tensors
def _cached_layout(block_sparse_json, seqlen_q, seqlen_k, device, num_heads):
    fields = json.loads(block_sparse_json)
    if fields["pattern"] != "per_head":
        return _layout_of(fields, seqlen_q, seqlen_k, device)
    block_size = fields.get("block_size", 128)
    heads = [json.dumps({**head, "block_size": block_size}, sort_keys=True) for head in fields["heads"]]
    # equal patterns become one object, whose lists the heads share
    made = {head: _layout_of(json.loads(head), seqlen_q, seqlen_k, device) for head in dict.fromkeys(heads)}
    return per_head([made[head] for head in heads], num_heads)


def _layout_of(fields, seqlen_q, seqlen_k, device):
    options = {_ARGUMENTS.get(name, name): value for name, value in fields.items() if name != "pattern"}
    if fields["pattern"] == "dense":
        return dense(seqlen_q, seqlen_k, device=device, **options)
    if fields["pattern"] == "grid_2d":
        return _grid_2d_of(seqlen_q, device=device, **options)
    build = {
        "local": local, "local_global": local_global, "bigbird": bigbird, "strided": strided, "butterfly": butterfly,
    }[fields["pattern"]]  # fmt: skip
    return build(seqlen_q, device=device, **options)


def _grid_2d_of(seqlen, n_global=0, height=None, width=None, **options):
    image = "a square image" if height is None else f"an image of {height} x {width} pixels"
    if height is None:
        height = width = math.isqrt(max(seqlen - n_global, 0))
    if n_global + height * width != seqlen:
        raise ValueError(
            f"block_sparse pattern 'grid_2d' takes {n_global} global tokens followed by {image}, got {seqlen} tokens"
        )
    return grid_2d(height, width, n_global=n_global, **options)
