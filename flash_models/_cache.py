# SPDX-License-Identifier: Apache-2.0
"""A cache for functions that make tensors."""

from functools import wraps

import torch

_CACHE_SIZE = 64


def remember(kept, key, build):
    """kept[key], first made by `build()` if it is missing; `kept` holds the 64 newest.

    Unlike `functools.lru_cache` it is safe for tensors: what was first asked for under inference mode also serves
    training, and tensors that do not outlive their maker (fake ones of torch.export, memory of a CUDA graph) are
    handed out but not kept.
    """
    if key not in kept:
        with torch.inference_mode(False):
            made = build()
        faked = type(torch.empty(0)) is not torch.Tensor
        if faked or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return made
        if len(kept) == _CACHE_SIZE:
            del kept[next(iter(kept))]
        kept[key] = made
    return kept[key]


def cache_tensors(build):
    """`build(*key)`, remembered: see `remember`."""
    kept = {}

    @wraps(build)
    def cached(*key):
        return remember(kept, key, lambda: build(*key))

    return cached
