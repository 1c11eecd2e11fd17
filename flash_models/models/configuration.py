# SPDX-License-Identifier: Apache-2.0
"""Configurations of the models of this library."""

from dataclasses import dataclass
from typing import ClassVar

from transformers import BertConfig, GPT2Config

from ..layouts import BLOCK_SIZES, check_config
from .auto import OwnCode, write_stub

IO_AWARE = "io_aware"  # the attn_implementation that hf.py registers
_HEAD_DIM_MULTIPLE = {"absolute": 1, "rotary": 2, "rotary_2d": 4}


@dataclass(kw_only=True, repr=False, eq=False)
class FlashConfigMixin(OwnCode):
    """The fields that all models of this library have on top of those of Hugging Face."""

    position_embedding_types: ClassVar = ("absolute", "rotary")

    position_embedding_type: str = "absolute"
    block_sparse: dict | None = None
    rotary_max_wavelength: float | int = 65536.0
    fuse: bool | list = False

    def __post_init__(self, **kwargs):
        if kwargs.get("attn_implementation") is None and not kwargs.get("output_attentions"):
            kwargs["attn_implementation"] = IO_AWARE
        super().__post_init__(**kwargs)
        if self.position_embedding_type not in self.position_embedding_types:
            raise ValueError(
                f"position_embedding_type must be one of {self.position_embedding_types}, "
                f"got {self.position_embedding_type!r}"
            )
        head_dim = self.hidden_size // self.num_attention_heads
        multiple = _HEAD_DIM_MULTIPLE[self.position_embedding_type]
        if head_dim % multiple:
            raise ValueError(f"{self.position_embedding_type} needs a head dim divisible by {multiple}, got {head_dim}")
        if self.block_sparse is not None:
            check_config(self.block_sparse, self.num_attention_heads)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Hugging Face's, and the stub by which `trust_remote_code=True` finds this library; see auto.py."""
        write_stub(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)


class FlashBertConfig(FlashConfigMixin, BertConfig):
    """A BERT with IO-aware attention, optionally block-sparse, and a choice of positions.

    Fields on top of `BertConfig`:
        position_embedding_type: "absolute" (BERT's table), "rotary" (along the text) or "rotary_2d" (over an image).
            The rotary types have no table and no longest input: `max_position_embeddings` does not bind them.
        block_sparse: None for exact attention, or a dict as in `layouts.from_config`.
        num_global_tokens: tokens in front of an image. They are not rotated, and pattern grid_2d makes them global.
        image_block_size: 64 or 128, the `layouts.tile_order` in which the pixels of an image are stored (rotary_2d).
        rotary_max_wavelength: longest wavelength of the rotation in tokens or pixels.
        fuse: False, True or a list of fusions, as in `flash_models.patch`: faster training steps.
    """

    model_type = "flash_bert"
    position_embedding_types: ClassVar = ("absolute", "rotary", "rotary_2d")

    num_global_tokens: int = 0
    image_block_size: int = 64

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.image_block_size not in BLOCK_SIZES:
            raise ValueError(f"image_block_size must be one of {BLOCK_SIZES}, got {self.image_block_size}")


class FlashGPT2Config(FlashConfigMixin, GPT2Config):
    """A GPT-2 with IO-aware attention, optionally block-sparse, and a choice of positions.

    Fields on top of `GPT2Config`:
        position_embedding_type: "absolute" (GPT-2's table) or "rotary", which has no table and no longest input:
            `n_positions` does not bind it.
        block_sparse: None for exact attention, or a dict as in `layouts.from_config`; always causal too.
        rotary_max_wavelength: longest wavelength of the rotation in tokens.
        fuse: False, True or a list of fusions, as in `flash_models.patch`: faster training steps.
    """

    model_type = "flash_gpt2"
