# SPDX-License-Identifier: Apache-2.0
"""What the fused modules of BERT and GPT-2 share.

A fused module is an instance of a subclass of its class in transformers, with the same name: FSDP and `device_map` find
layers by the names of their classes, and submodules, parameters, state dict, copies and pickles stay what they were.
`fuse` holds the names of the fusions that the module is to do.
"""

import torch
from torch import nn
from transformers.activations import FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from ..fused import bias_gelu, dropout_add_norm, feed_forward, layer_norm, linear_dropout_add_norm
from ..fused.dispatch import multiply
from .logits import Logits

# what F.gelu calls them; FastGELU writes the constant of the tanh form with ten digits
_GELUS = {GELUActivation: "none", NewGELUActivation: "tanh", GELUTanh: "tanh", FastGELUActivation: "tanh"}


def _records(hook):
    """Whether it is what transformers installs for good, once weights are asked for: it reads only these."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def is_plain(module, *classes):
    """Whether nothing but the class says what `module` computes: no adapter, no quantization, no hook to be skipped."""
    if type(module) not in classes or "forward" in vars(module):
        return False
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return not module._forward_hooks or all(map(_records, module._forward_hooks.values()))


def product_and_bias(linear, x):
    """(x W, b), so that the bias is added where something else is done; (the module's result, None) if not plain."""
    if not is_plain(linear, nn.Linear, Conv1D):
        return linear(x), None
    return multiply(x, linear.weight, type(linear) is Conv1D), linear.bias


def linear_gelu(linear, activation, x, fuse):
    """activation(linear(x)), in one pass after the product where it is a GELU and `fuse` has "gelu"."""
    approximate = _GELUS.get(type(activation))
    if "gelu" not in fuse or approximate is None:
        return activation(linear(x))
    return bias_gelu(*product_and_bias(linear, x), approximate)


def linear_norm(linear, x, residual, norm, p, post_norm=False):
    """(residual + dropout(linear(x)), the LayerNorm `norm` of it or None without one)."""
    if not is_plain(linear, nn.Linear, Conv1D):
        return dropout_add_norm(linear(x), None, residual, norm, p, post_norm)
    transposed = type(linear) is Conv1D
    return linear_dropout_add_norm(x, linear.weight, linear.bias, residual, norm, p, post_norm, transposed)


def gelu_norm(first, activation, second, x, residual, norm, p, fuse, post_norm=False):
    """`linear_norm` of activation(first(x)) and `second`."""
    approximate, kind = _GELUS.get(type(activation)), type(first)
    plain = is_plain(first, nn.Linear, Conv1D) and is_plain(second, kind)
    if "gelu" not in fuse or approximate is None or not plain:
        return linear_norm(second, linear_gelu(first, activation, x, fuse), residual, norm, p, post_norm)
    parameters = first.weight, first.bias, approximate, second.weight, second.bias
    return feed_forward(x, *parameters, residual, norm, p, post_norm, kind is Conv1D)


def dropout_p(dropout):
    return dropout.p if dropout.training else 0.0


class Linear(nn.Linear):
    """The projection to the vocabulary: in training its result is a `Logits`."""

    def forward(self, x):
        wanted = self.training and torch.is_grad_enabled() and x.dim() > 1
        if wanted and "eager" in self.fuse:
            wanted = not torch.compiler.is_compiling()
        # nn.DataParallel gathers nothing but tensors
        if wanted and not getattr(self, "_is_replica", False):
            return Logits(x, self.weight, self.bias)
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """The last one of GPT-2, in the dtype in which the projection to the vocabulary reads it."""

    def forward(self, x):
        return layer_norm(x, self)
