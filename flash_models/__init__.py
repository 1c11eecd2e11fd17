# SPDX-License-Identifier: Apache-2.0
"""Exact, IO-aware attention for the BERT and GPT-2 models you already have.

Importing the package loads the kernels and registers the attention `io_aware` and the model types `flash_bert` and
`flash_gpt2` with transformers.
"""

from . import layouts, models
from ._library import info
from .hf import patch, unpatch
from .layouts import BlockLayout
from .long_context import extend_context
from .models import *  # noqa: F403  (the classes in models.__all__)
from .ops import attention

__version__ = "0.1.0"

__all__ = [
    *models.__all__,
    "BlockLayout",
    "attention",
    "extend_context",
    "info",
    "layouts",
    "patch",
    "unpatch",
]
