# SPDX-License-Identifier: Apache-2.0
"""BERT with IO-aware attention: Hugging Face's classes and weight names, with other defaults and positions."""

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
)
from transformers.models.bert.modeling_bert import BertEmbeddings

from .configuration import IO_AWARE, FlashBertConfig
from .rotary import ROTARY_TYPES


class FlashBertEmbeddings(BertEmbeddings):
    """BERT's embeddings, without a position table if positions are rotary (those are applied to q and k)."""

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        self.rotary = config.position_embedding_type in ROTARY_TYPES
        if self.rotary:
            self.position_embeddings = None

    def forward(
        self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, past_key_values_length=0
    ):
        """Embeddings (B, S, hidden_size) of input_ids (B, S) or inputs_embeds (B, S, hidden_size)."""
        implementation = self.config._attn_implementation
        if implementation != IO_AWARE and (self.rotary or self.config.block_sparse is not None):
            what = "rotary positions" if self.rotary else "block_sparse attention"
            raise ValueError(
                f"this model has {what}, which attn_implementation={implementation!r} would silently leave out; "
                f"use {IO_AWARE!r}"
            )
        if not self.rotary:
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            # the row itself, because the gradient of a lookup would add up B * S rows one by one
            embeddings = embeddings + self.token_type_embeddings.weight[0]
        else:
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(embeddings))


class FlashBertMixin:
    """What every FlashBert class adds to its BERT class."""

    config_class = FlashBertConfig
    # of a vanilla checkpoint loaded with rotary positions
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_embeddings\.weight"]

    def __init__(self, config, *args, **kwargs):
        if not isinstance(config, FlashBertConfig):
            raise TypeError(
                f"{type(self).__name__} takes a FlashBertConfig, got {type(config).__name__}; "
                "convert it with FlashBertConfig(**config.to_dict())"
            )
        super().__init__(config, *args, **kwargs)
        self.base_model.embeddings = FlashBertEmbeddings(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"the weights in {pretrained_model_name_or_path} are damaged or cut short ({error}); fetch them again"
            ) from error


class FlashBertModel(FlashBertMixin, BertModel):
    """`BertModel` with the configuration `FlashBertConfig`."""


class FlashBertForSequenceClassification(FlashBertMixin, BertForSequenceClassification):
    """`BertForSequenceClassification` with the configuration `FlashBertConfig`."""


AutoConfig.register(FlashBertConfig.model_type, FlashBertConfig)
AutoModel.register(FlashBertConfig, FlashBertModel)
AutoModelForSequenceClassification.register(FlashBertConfig, FlashBertForSequenceClassification)
