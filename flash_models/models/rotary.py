# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (arXiv 2104.09864) along a text or over an image stored tile by tile.

Component d of a head is paired with component d + D/2 and the pair is turned by position * frequency. Wavelengths
(2 pi / frequency) run geometrically from 2 pi to `rotary_max_wavelength` tokens or pixels. Positions are absolute and
never interpolated, so what a model learns at one length or resolution holds at another.
"""

import math
import operator

import torch

from .._cache import cache_tensors
from ..layouts import tile_order

ROTARY_TYPES = ("rotary", "rotary_2d")


def is_rotary(config):
    """Whether a model's q and k are to be rotated here. Other models with a field of this name rotate by themselves."""
    return getattr(config, "position_embedding_type", None) in ROTARY_TYPES and hasattr(config, "rotary_max_wavelength")


def _frequencies(count, max_wavelength):
    """Radians per token of `count` pairs, highest first: float64 (count,)."""
    step = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    return (2 * math.pi / max_wavelength) ** step


def _tables(angle, device):
    return angle.cos().to(device, torch.float32), angle.sin().to(device, torch.float32)


@cache_tensors
def _text_tables(length, head_dim, max_wavelength, device):
    position = torch.arange(length, dtype=torch.float64, device="cpu")
    return _tables(position[:, None] * _frequencies(head_dim // 2, max_wavelength), device)


@cache_tensors
def _image_tables(length, head_dim, max_wavelength, num_global_tokens, image_block_size, device):
    """Half of the pairs turn with the row of the pixel, half with its column; global tokens do not turn."""
    side = math.isqrt(max(length - num_global_tokens, 0))
    if side == 0 or num_global_tokens + side * side != length:
        raise ValueError(
            f"rotary_2d takes {num_global_tokens} global tokens (config.num_global_tokens) followed by a square image, "
            f"got {length} tokens"
        )
    raster = tile_order(side, side, image_block_size)
    frequency = _frequencies(head_dim // 4, max_wavelength)
    turn = torch.cat([(raster // side)[:, None] * frequency, (raster % side)[:, None] * frequency], -1)
    return _tables(torch.cat([turn.new_zeros(num_global_tokens, head_dim // 2), turn]), device)


# While torch.compile traces, the tables are made for real and become constants of the graph.
_constant_text_tables = torch.compiler.assume_constant_result(lambda *key: _text_tables(*key))
_constant_image_tables = torch.compiler.assume_constant_result(lambda *key: _image_tables(*key))


def rotary_tables(config, length, head_dim, device):
    """Cosine and sine of the angle of every position and pair: float32 (length, head_dim / 2) each, cached."""
    index = operator.index  # makes torch.compile treat an integer as a constant of the graph
    head_dim, wavelength = index(head_dim), index(int(config.rotary_max_wavelength * 1000)) / 1000
    if config.position_embedding_type == "rotary_2d":
        image = index(config.num_global_tokens), index(config.image_block_size)
        return _constant_image_tables(index(length), head_dim, wavelength, *image, device)
    capacity = 1024
    while capacity < length:
        capacity *= 2
    cos, sin = _constant_text_tables(capacity, head_dim, wavelength, device)
    return cos[:length], sin[:length]


def rotate(x, cos, sin):
    """Turn x (B, S, H, D) by tables (S, D / 2): computed in float32, returned contiguous in x's dtype."""
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
