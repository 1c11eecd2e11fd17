# SPDX-License-Identifier: Apache-2.0
"""What the models of this library change in Hugging Face's: the default attention, and positions that are rotary."""

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationMixin, GPT2PreTrainedModel

from . import fusing, hooks
from .auto import OwnCode
from .configuration import IO_AWARE, FlashBertConfig, FlashGPT2Config
from .rotary import is_rotary


def _before_forward(module, args, kwargs):
    """Forward pre-hook of a BertModel or GPT2Model: refuse a wrong attention."""
    config = module.config
    implementation = config._attn_implementation
    if implementation != IO_AWARE and (is_rotary(config) or config.block_sparse is not None):
        what = "rotary positions" if is_rotary(config) else "block_sparse attention"
        raise ValueError(
            f"this model has {what}, which attn_implementation={implementation!r} would silently leave out; "
            f"use {IO_AWARE!r}"
        )


class FlashMixin(OwnCode):
    """What every class of this library adds to its Hugging Face class."""

    def __init__(self, config, *args, **kwargs):
        if not isinstance(config, self.config_class):
            expected = self.config_class.__name__
            raise TypeError(
                f"{type(self).__name__} takes a {expected}, got {type(config).__name__}; "
                f"convert it with {expected}(**config.to_dict())"
            )
        super().__init__(config, *args, **kwargs)
        self.base_model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        hooks.install(self.base_model, no_cache=True)
        if isinstance(self, GenerationMixin) and self.loss_type is None:
            # transformers would take the same loss, with a warning that torch.compile cannot trace
            self.loss_type = "ForCausalLM"
        fusing.install(self, fusing.check_fusions(config.fuse), own=True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"the weights in {pretrained_model_name_or_path} are damaged or cut short ({error}); fetch them again"
            ) from error


class RotaryBertEmbeddings(nn.Module):
    """The parts of a `BertEmbeddings` that are left without its position table; q and k are rotated instead."""

    def __init__(self, embeddings):
        super().__init__()
        self.word_embeddings = embeddings.word_embeddings
        self.token_type_embeddings = embeddings.token_type_embeddings
        self.LayerNorm = embeddings.LayerNorm
        self.dropout = embeddings.dropout

    def forward(
        self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, past_key_values_length=0
    ):
        """Embeddings (B, S, hidden_size) of input_ids (B, S) or inputs_embeds (B, S, hidden_size)."""
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            # the row itself, because the gradient of a lookup would add up B * S rows one by one
            embeddings = embeddings + self.token_type_embeddings.weight[0]
        else:
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(embeddings))


class FlashBertMixin(FlashMixin):
    """What every FlashBert class adds to its BERT class."""

    config_class = FlashBertConfig
    # of a vanilla checkpoint loaded with rotary positions
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_embeddings\.weight"]

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if is_rotary(config):
            self.base_model.embeddings = RotaryBertEmbeddings(self.base_model.embeddings)


class NoPositions(nn.Module):
    """In the place of GPT-2's position table: q and k are rotated instead."""

    def forward(self, position_ids):
        """A zero, which GPT-2 adds to its embeddings."""
        return torch.zeros((), device=position_ids.device)


class FlashGPT2Mixin(FlashMixin):
    """What every FlashGPT2 class adds to its GPT-2 class."""

    config_class = FlashGPT2Config
    # the second of a vanilla checkpoint loaded with rotary positions
    _keys_to_ignore_on_load_unexpected = [*GPT2PreTrainedModel._keys_to_ignore_on_load_unexpected, r"wpe\.weight"]

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if is_rotary(config):
            self.base_model.wpe = NoPositions()
