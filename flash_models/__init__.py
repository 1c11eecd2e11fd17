# SPDX-License-Identifier: Apache-2.0
"""Exact, IO-aware attention for the BERT and GPT-2 models you already have.

Importing the package loads the kernels and registers the attention `io_aware` and the model type `flash_bert` with
transformers.
"""

from . import layouts
from ._library import info
from .hf import patch, unpatch
from .layouts import BlockLayout
from .models import FlashBertConfig, FlashBertForSequenceClassification, FlashBertModel, images_to_input_ids
from .ops import attention

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "FlashBertConfig",
    "FlashBertForSequenceClassification",
    "FlashBertModel",
    "attention",
    "images_to_input_ids",
    "info",
    "layouts",
    "patch",
    "unpatch",
]
