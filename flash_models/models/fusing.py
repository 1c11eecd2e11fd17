# SPDX-License-Identifier: Apache-2.0
"""Which modules of a BERT or GPT-2 are fused, by exchanging their classes, and how that is taken back."""

from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertLMHeadModel,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.bert import modeling_bert as bert
from transformers.models.gpt2 import modeling_gpt2 as gpt2

from . import compiled_loss, fused_bert, fused_gpt2, fused_layers, hooks

# fusion: the classes that take part in it
FUSIONS = {
    "gelu": (bert.BertIntermediate, bert.BertPredictionHeadTransform, gpt2.GPT2MLP),
    "norm": (
        *(bert.BertEmbeddings, bert.BertSelfOutput, bert.BertOutput, bert.BertLayer, bert.BertPredictionHeadTransform),
        *(gpt2.GPT2Block, gpt2.GPT2Attention, gpt2.GPT2MLP, nn.LayerNorm),
    ),
    "qkv": (bert.BertSelfAttention, gpt2.GPT2Attention),
    "cross_entropy": (nn.Linear,),
    "cache": (),  # a hook, see hooks.py
}
_LM_HEADS = (BertForMaskedLM, BertForPreTraining, BertLMHeadModel, GPT2DoubleHeadsModel, GPT2LMHeadModel)
# compiled they project every token: of their loss, nn.CrossEntropyLoss, torch.compile knows the arguments to be tensors
_EAGER_LOSS = (BertForPreTraining, GPT2DoubleHeadsModel)
_HOMES = {bert.__name__: fused_bert, gpt2.__name__: fused_gpt2}  # by the module where transformers defines a class


def check_fusions(fuse):
    """frozenset of the names that `fuse` stands for: True is all, False or None none."""
    if fuse is True or fuse is False or fuse is None:
        return frozenset(FUSIONS if fuse else ())
    names = {fuse} if isinstance(fuse, str) else set(fuse)
    unknown = sorted(map(str, names - FUSIONS.keys()))
    if unknown:
        raise ValueError(f"unknown fusion {', '.join(map(repr, unknown))}; fuse takes True, False or {set(FUSIONS)}")
    return frozenset(names)


def _candidates(model):
    """(module, whether only in eager mode) for what can be fused. Of general classes only those whose reader is known:
    the projection to the vocabulary, and GPT-2's last LayerNorm in front of it."""
    for module in model.modules():
        if isinstance(module, _LM_HEADS):
            yield module.get_output_embeddings(), isinstance(module, _EAGER_LOSS)
            if isinstance(module, gpt2.GPT2PreTrainedModel):
                yield module.transformer.ln_f, False
        elif type(module).__module__ in _HOMES:
            yield module, False


def install(model, names, own=False):
    """Fuse `names` in the modules of `model` of exactly transformers' classes; of others, other code may be meant.

    own: it is part of the model, and `remove` does not take it back."""
    for module, eager in list(_candidates(model)):
        mine = {name for name in names if type(module) in FUSIONS[name]}
        if mine:
            home = _HOMES.get(type(module).__module__, fused_layers)
            module.__class__ = getattr(home, type(module).__name__)
            module.fuse = frozenset([*mine, *["eager"] * eager, *["own"] * own])
    for module in model.modules():
        if "cross_entropy" not in names or not isinstance(module, _LM_HEADS) or "fuse" in vars(module):
            continue
        mine = {"own"} if own else set()
        if module.loss_type is None and not hasattr(module, "_loss_function"):
            # transformers would take the same loss, with a warning that torch.compile cannot trace. Not the loss_type,
            # by which Trainer decides what it counts as num_items_in_batch
            module.loss_function = ForCausalLMLoss
            mine.add("loss_function")
        if isinstance(module, BertForMaskedLM):
            compiled_loss.install(module)
            mine.add("labels")
        module.fuse = frozenset(mine)


def remove(model):
    """Take back what `install` did."""
    for module in model.modules():
        fuse = vars(module).get("fuse")
        if fuse is None or "own" in fuse:
            continue
        if "loss_function" in fuse:
            del module._loss_function
        if "labels" in fuse:
            hooks.remove(module, compiled_loss.ids(module))
        if not isinstance(module, _LM_HEADS):
            module.__class__ = next(cls for cls in type(module).__bases__ if issubclass(cls, nn.Module))
        del module.fuse
