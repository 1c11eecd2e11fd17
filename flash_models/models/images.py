# SPDX-License-Identifier: Apache-2.0
"""Images as token ids."""

import torch

from ..layouts import tile_order


def images_to_input_ids(images, config):
    """Token ids of square grey images for a rotary_2d model: int64 (B, num_global_tokens + H * W).

    images: uint8 (B, H, W), H = W. A pixel's grey level is its id, 0 to 255, and pixels are stored tile by tile (see
    `layouts.tile_order` and `config.image_block_size`). In front stand the global tokens, with the ids 256, 257 and so
    on; the first of them is the [CLS] token that feeds BERT's pooler. `config.vocab_size` must be at least
    256 + num_global_tokens.
    """
    if images.dtype != torch.uint8 or images.dim() != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"images must be uint8 (B, side, side), got {images.dtype} of shape {tuple(images.shape)}")
    if config.vocab_size < 256 + config.num_global_tokens:
        raise ValueError(
            f"config.vocab_size is {config.vocab_size}, but 256 grey levels and {config.num_global_tokens} global "
            f"tokens need {256 + config.num_global_tokens}"
        )
    order = tile_order(images.shape[1], images.shape[2], config.image_block_size, images.device)
    pixels = images.flatten(1)[:, order].long()
    global_tokens = torch.arange(256, 256 + config.num_global_tokens, device=images.device)
    return torch.cat([global_tokens.expand(len(images), -1), pixels], 1)
