# SPDX-License-Identifier: Apache-2.0
"""BERT with IO-aware attention: Hugging Face's classes, heads and weight names."""

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    BertTokenizer,
)

from .auto import register
from .configuration import FlashBertConfig
from .modeling import FlashBertMixin


class FlashBertModel(FlashBertMixin, BertModel):
    """`BertModel` with the configuration `FlashBertConfig`."""


class FlashBertForPreTraining(FlashBertMixin, BertForPreTraining):
    """`BertForPreTraining` with the configuration `FlashBertConfig`."""


class FlashBertLMHeadModel(FlashBertMixin, BertLMHeadModel):
    """`BertLMHeadModel` with the configuration `FlashBertConfig`."""


class FlashBertForMaskedLM(FlashBertMixin, BertForMaskedLM):
    """`BertForMaskedLM` with the configuration `FlashBertConfig`."""


class FlashBertForNextSentencePrediction(FlashBertMixin, BertForNextSentencePrediction):
    """`BertForNextSentencePrediction` with the configuration `FlashBertConfig`."""


class FlashBertForSequenceClassification(FlashBertMixin, BertForSequenceClassification):
    """`BertForSequenceClassification` with the configuration `FlashBertConfig`."""


class FlashBertForMultipleChoice(FlashBertMixin, BertForMultipleChoice):
    """`BertForMultipleChoice` with the configuration `FlashBertConfig`."""


class FlashBertForTokenClassification(FlashBertMixin, BertForTokenClassification):
    """`BertForTokenClassification` with the configuration `FlashBertConfig`."""


class FlashBertForQuestionAnswering(FlashBertMixin, BertForQuestionAnswering):
    """`BertForQuestionAnswering` with the configuration `FlashBertConfig`."""


register(
    FlashBertConfig,
    BertTokenizer,
    {
        AutoModel: FlashBertModel,
        AutoModelForTextEncoding: FlashBertModel,
        AutoModelForPreTraining: FlashBertForPreTraining,
        AutoModelForCausalLM: FlashBertLMHeadModel,
        AutoModelForMaskedLM: FlashBertForMaskedLM,
        AutoModelForNextSentencePrediction: FlashBertForNextSentencePrediction,
        AutoModelForSequenceClassification: FlashBertForSequenceClassification,
        AutoModelForMultipleChoice: FlashBertForMultipleChoice,
        AutoModelForTokenClassification: FlashBertForTokenClassification,
        AutoModelForQuestionAnswering: FlashBertForQuestionAnswering,
    },
)
