# SPDX-License-Identifier: Apache-2.0
"""Models that load with `AutoModel` once this library is imported."""

from .bert import (
    FlashBertForMaskedLM,
    FlashBertForMultipleChoice,
    FlashBertForNextSentencePrediction,
    FlashBertForPreTraining,
    FlashBertForQuestionAnswering,
    FlashBertForSequenceClassification,
    FlashBertForTokenClassification,
    FlashBertLMHeadModel,
    FlashBertModel,
)
from .configuration import FlashBertConfig, FlashGPT2Config
from .gpt2 import (
    FlashGPT2DoubleHeadsModel,
    FlashGPT2ForQuestionAnswering,
    FlashGPT2ForSequenceClassification,
    FlashGPT2ForTokenClassification,
    FlashGPT2LMHeadModel,
    FlashGPT2Model,
)
from .images import images_to_input_ids
from .packing import DataCollatorForPackedMaskedLM

__all__ = [
    "DataCollatorForPackedMaskedLM",
    "FlashBertConfig",
    "FlashBertForMaskedLM",
    "FlashBertForMultipleChoice",
    "FlashBertForNextSentencePrediction",
    "FlashBertForPreTraining",
    "FlashBertForQuestionAnswering",
    "FlashBertForSequenceClassification",
    "FlashBertForTokenClassification",
    "FlashBertLMHeadModel",
    "FlashBertModel",
    "FlashGPT2Config",
    "FlashGPT2DoubleHeadsModel",
    "FlashGPT2ForQuestionAnswering",
    "FlashGPT2ForSequenceClassification",
    "FlashGPT2ForTokenClassification",
    "FlashGPT2LMHeadModel",
    "FlashGPT2Model",
    "images_to_input_ids",
]
