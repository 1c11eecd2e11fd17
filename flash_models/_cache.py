# SPDX-License-Identifier: Apache-2.0
"""A cache for functions that make tensors."""

from functools import wraps

import torch

_CACHE_SIZE = 64


def cache_tensors(build):
    """Remember the tensors that `build(*key)` makes, for the 64 newest keys.

    Unlike `functools.lru_cache` it is safe for tensors: what was first asked for under inference mode also serves
    training, and tensors that do not outlive their maker (fake ones of torch.export, memory of a CUDA graph) are
    handed out but not kept.
    """
    kept = {}

    @wraps(build)
    def cached(*key):
        if key not in kept:
            with torch.inference_mode(False):
                made = build(*key)
            faked = type(torch.empty(0)) is not torch.Tensor
            if faked or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                return made
            if len(kept) == _CACHE_SIZE:
                del kept[next(iter(kept))]
            kept[key] = made
        return kept[key]

    return cached
