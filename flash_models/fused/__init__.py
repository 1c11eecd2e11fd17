# SPDX-License-Identifier: Apache-2.0
"""What stands around attention in a training step, in fewer passes over memory.

Every function has two forms with one meaning: plain PyTorch, which is the definition and runs anywhere; and on CUDA the
kernels of kernels/sublayer, which read and write every activation once. torch.compile takes these as they are: fusing
plain PyTorch by itself it draws four random words for each value that it drops, and sums gradients over rows in passes
of their own.
"""

from .cross_entropy import linear_cross_entropy
from .gelu import bias_gelu
from .norm import dropout_add_norm, layer_norm, norm_and_residual
from .projection import project_qkv
from .sublayer import feed_forward, linear_dropout_add_norm

__all__ = [
    "bias_gelu",
    "dropout_add_norm",
    "feed_forward",
    "layer_norm",
    "linear_cross_entropy",
    "linear_dropout_add_norm",
    "norm_and_residual",
    "project_qkv",
]
