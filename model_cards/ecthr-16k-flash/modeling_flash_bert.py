# SPDX-License-Identifier: Apache-2.0
try:
    from flash_models.models import (
        FlashBertConfig, FlashBertForMaskedLM, FlashBertForMultipleChoice, FlashBertForNextSentencePrediction,
        FlashBertForPreTraining, FlashBertForQuestionAnswering, FlashBertForSequenceClassification,
        FlashBertForTokenClassification, FlashBertLMHeadModel, FlashBertModel,
    )
except ModuleNotFoundError as error:
    raise ImportError(f"{error}; this checkpoint needs flash-models: pip install flash-models") from error
