# SPDX-License-Identifier: Apache-2.0
"""The fused loss of a compiled BertForMaskedLM: hooks by which the labels go around its own.

Its loss is nn.CrossEntropyLoss, whose arguments torch.compile knows to be tensors, and not `Logits`.
"""

import inspect

import torch
from torch.nn import functional as F
from transformers import BertForMaskedLM

_NAMES = tuple(inspect.signature(BertForMaskedLM.forward).parameters)[1:]


def hold_labels(module, args, kwargs):
    """Forward pre-hook: what torch.compile traces in training sees the labels under a name that it ignores."""
    kwargs = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    fused = module.training and torch.is_grad_enabled() and torch.compiler.is_compiling()
    if not fused or kwargs.get("labels") is None:
        return None
    kwargs["held_labels"] = kwargs.pop("labels")
    return (), kwargs


def loss_of_held_labels(module, args, kwargs, output):
    """Forward hook: the output with the loss of these labels."""
    labels = kwargs.get("held_labels")
    if labels is None:
        return None
    is_tuple = isinstance(output, tuple)
    logits = output[0] if is_tuple else output.logits
    loss = F.cross_entropy(logits.view(-1, module.config.vocab_size), labels.view(-1))
    return (loss, *output) if is_tuple else type(output)(loss=loss, **output)


def install(model):
    """Hook `model`, a BertForMaskedLM."""
    model.register_forward_pre_hook(hold_labels, with_kwargs=True)
    model.register_forward_hook(loss_of_held_labels, with_kwargs=True)


def ids(model):
    """[("", id)] of what `install` hooked, for `hooks.remove`."""
    present = {**model._forward_pre_hooks, **model._forward_hooks}
    return [("", number) for number, hook in present.items() if hook in (hold_labels, loss_of_held_labels)]
