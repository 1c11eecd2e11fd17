# SPDX-License-Identifier: Apache-2.0
"""A model of this library on PyTorch's scaled_dot_product_attention: the same model but for the attention itself."""

from unittest.mock import patch

import torch
from torch.nn.functional import scaled_dot_product_attention

from flash_models import hf

MASKED_ROWS = 4096  # queries at a time, where there is a mask: in bf16, all of it would be 9 GB at 65,600 tokens


def sdpa_instead(mask=None):
    """Context in which every model on `io_aware` attends with SDPA, under the mask bool (S, S) if given.

    Only the op is exchanged, so that rotary positions stay. A block layout in the model's config does not count: what
    it hides must be in the mask."""

    def attention(q, k, v, *, scale=None, **options):  # heads first
        if mask is None:
            return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        rows = zip(q.split(MASKED_ROWS, 2), mask.split(MASKED_ROWS), strict=True)
        parts = [scaled_dot_product_attention(part, k, v, attn_mask=visible, scale=scale) for part, visible in rows]
        return torch.cat(parts, 2).transpose(1, 2)

    return patch.multiple(hf, attention=attention, why_not_kernel=lambda *arguments: None)
