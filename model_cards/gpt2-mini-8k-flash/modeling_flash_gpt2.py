# SPDX-License-Identifier: Apache-2.0
try:
    from flash_models.models import (
        FlashGPT2Config, FlashGPT2ForQuestionAnswering, FlashGPT2ForSequenceClassification,
        FlashGPT2ForTokenClassification, FlashGPT2LMHeadModel, FlashGPT2Model,
    )
except ModuleNotFoundError as error:
    raise ImportError(f"{error}; this checkpoint needs flash-models: pip install flash-models") from error
