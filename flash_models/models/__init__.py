# SPDX-License-Identifier: Apache-2.0
"""Models that load with `AutoModel` once this library is imported."""

from .configuration import FlashBertConfig
from .images import images_to_input_ids
from .modeling import FlashBertForSequenceClassification, FlashBertModel

__all__ = ["FlashBertConfig", "FlashBertForSequenceClassification", "FlashBertModel", "images_to_input_ids"]
