# SPDX-License-Identifier: Apache-2.0
"""GPT-2 with IO-aware attention: Hugging Face's classes, heads and weight names."""

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2Tokenizer,
)

from .auto import register
from .configuration import FlashGPT2Config
from .modeling import FlashGPT2Mixin


class FlashGPT2Model(FlashGPT2Mixin, GPT2Model):
    """`GPT2Model` with the configuration `FlashGPT2Config`."""


class FlashGPT2LMHeadModel(FlashGPT2Mixin, GPT2LMHeadModel):
    """`GPT2LMHeadModel` with the configuration `FlashGPT2Config`."""


class FlashGPT2DoubleHeadsModel(FlashGPT2Mixin, GPT2DoubleHeadsModel):
    """`GPT2DoubleHeadsModel` with the configuration `FlashGPT2Config`."""


class FlashGPT2ForSequenceClassification(FlashGPT2Mixin, GPT2ForSequenceClassification):
    """`GPT2ForSequenceClassification` with the configuration `FlashGPT2Config`."""


class FlashGPT2ForTokenClassification(FlashGPT2Mixin, GPT2ForTokenClassification):
    """`GPT2ForTokenClassification` with the configuration `FlashGPT2Config`."""


class FlashGPT2ForQuestionAnswering(FlashGPT2Mixin, GPT2ForQuestionAnswering):
    """`GPT2ForQuestionAnswering` with the configuration `FlashGPT2Config`."""


register(
    FlashGPT2Config,
    GPT2Tokenizer,
    {
        AutoModel: FlashGPT2Model,
        AutoModelForPreTraining: FlashGPT2LMHeadModel,
        AutoModelForCausalLM: FlashGPT2LMHeadModel,
        AutoModelForSequenceClassification: FlashGPT2ForSequenceClassification,
        AutoModelForTokenClassification: FlashGPT2ForTokenClassification,
        AutoModelForQuestionAnswering: FlashGPT2ForQuestionAnswering,
    },
)
