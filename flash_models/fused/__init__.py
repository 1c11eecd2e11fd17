# SPDX-License-Identifier: Apache-2.0
"""What stands around attention in a training step, in fewer passes over memory.

Every function has two forms with one meaning: plain PyTorch, which is the definition, runs anywhere and is what
torch.compile traces and fuses by itself; and on CUDA, in eager mode, Triton kernels, which read and write every
activation once. Triton, and not small functions under torch.compile, because a launch costs a quarter of the host time
of a compiled function's guards, `retain_graph` works, and no new length or model size makes anything compile again.
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
