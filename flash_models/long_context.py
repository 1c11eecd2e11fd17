# SPDX-License-Identifier: Apache-2.0
"""Longer position tables for BERT and GPT-2, so that a model pretrained on 512 or 1,024 tokens takes many more.

Methods: "tile" repeats the table (Longformer, arXiv 2004.05150), "interpolate" stretches it along the text and
"interpolate_2d" along both sides of an image (ViT, arXiv 2010.11929). All three are starting points for fine-tuning.
"""

import math
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.models.bert.modeling_bert import BertEmbeddings, BertPreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Model, GPT2PreTrainedModel

from . import models
from .layouts import check_config, tile_order
from .models.rotary import is_rotary

METHODS = ("interpolate", "tile", "interpolate_2d")


def _stretched(table, length):
    """`table` (n, ...) at `length` evenly spaced points of its first dimension, first and last rows kept exactly."""
    last = table.shape[0] - 1
    # whole and fractional part in integers, so that the last point is exactly the last row
    point = torch.arange(length, device=table.device) * last
    lower, rest = point // (length - 1), point % (length - 1)
    weight = (rest / (length - 1)).to(table.dtype).view(-1, *[1] * (table.dim() - 1))
    return torch.lerp(table[lower], table[(lower + 1).clamp(max=last)], weight)


def _square_side(num_positions, num_global, what):
    side = math.isqrt(max(num_positions - num_global, 0))
    if side == 0 or num_global + side * side != num_positions:
        in_front = f" behind {num_global} global tokens" if num_global else ""
        raise ValueError(
            f"method 'interpolate_2d' needs a square image{in_front}, but {what} {num_positions} is not "
            f"{num_global} + side * side; the next one is {num_global + (side + 1) ** 2}"
        )
    return side


def _stretched_2d(table, length, config):
    """Stretch a table over an image. FlashBert's pixels are stored tile by tile, those of other models row by row."""
    num_global = getattr(config, "num_global_tokens", 0)
    sides = _square_side(len(table), num_global, "the table's"), _square_side(length, num_global, "max_length")
    block_size = getattr(config, "image_block_size", None)
    raster = [torch.arange(side * side) if block_size is None else tile_order(side, side, block_size) for side in sides]
    old, new = (order.to(table.device) for order in raster)
    image = table.new_empty(sides[0] ** 2, table.shape[1])
    image[old] = table[num_global:]
    image = _stretched(image.unflatten(0, (sides[0], sides[0])), sides[1])
    image = _stretched(image.transpose(0, 1), sides[1]).transpose(0, 1).flatten(0, 1)
    return torch.cat([table[:num_global], image[new]])


@torch.no_grad()
def _longer(weight, length, method, config):
    if method == "tile":
        values = weight[torch.arange(length, device=weight.device) % len(weight)]
    else:  # in float32 at least: the weights of neighbours would be rounded to steps of 1/256 in bfloat16
        exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        values = _stretched(exact, length) if method == "interpolate" else _stretched_2d(exact, length, config)
        values = values.to(weight.dtype)
    return nn.Parameter(values, requires_grad=weight.requires_grad)


def _position_tables(model):
    """{position nn.Embedding: [the modules that use it]} of every BERT and GPT-2 in `model`."""
    tables = {}
    for module in model.modules():
        if isinstance(module, BertEmbeddings) and module.position_embeddings is not None:
            tables.setdefault(module.position_embeddings, []).append(module)
        elif isinstance(module, GPT2Model) and isinstance(module.wpe, nn.Embedding):  # not rotary
            tables.setdefault(module.wpe, []).append(module)
    return tables


def _configs(model, tables):
    """{table: [configs]}, the distinct configs of the Hugging Face models that hold it."""
    found = {table: {} for table in tables}
    for module in model.modules():
        if isinstance(module, (BertPreTrainedModel, GPT2PreTrainedModel)):
            for table in _position_tables(module):
                found[table][id(module.config)] = module.config
    return {table: list(configs.values()) for table, configs in found.items()}


def _check(model, max_length, method, tables):
    if not isinstance(model, nn.Module):
        raise TypeError(f"extend_context takes a torch.nn.Module, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise ValueError(f"max_length must be an int, a number of tokens; got {max_length!r}")
    if not tables:
        if any(is_rotary(getattr(module, "config", None)) for module in model.modules()):
            raise ValueError(
                f"{type(model).__name__} has rotary positions and no table to extend: it takes any length as it is"
            )
        raise ValueError(f"{type(model).__name__} holds no position table of a Hugging Face BERT or GPT-2")
    lengths = sorted({len(table.weight) for table in tables})
    if lengths[-1] > max_length:
        raise ValueError(
            f"the model already takes {lengths[-1]} tokens and extend_context does not shrink it to {max_length}; "
            "truncate the input instead"
        )
    if lengths == [max_length]:
        raise ValueError(f"the model already takes {max_length} tokens: nothing to extend")


def extend_context(model, max_length, *, method="interpolate", tokenizer=None):
    """Make every BERT and GPT-2 inside `model` take `max_length` tokens, in place. Returns `model`.

    model: any nn.Module that holds Hugging Face BERT or GPT-2 models with a position table, patched or not.
    method: "interpolate" stretches the table linearly and keeps its first and last row; "tile" repeats it and keeps
    all its rows; "interpolate_2d" stretches it over a square image of max_length = side * side pixels (FlashBert:
    behind `config.num_global_tokens` rows that stay as they are). tokenizer: its `model_max_length` is set too.

    Tables keep dtype, device and requires_grad, and configs and buffers follow, so that a saved model loads with the
    new size. The tables are new parameters: make the optimizer afterwards. Raises ValueError, with the model
    untouched, if there is no table to extend, one is longer than max_length, or an image is not square.
    """
    tables = _position_tables(model) if isinstance(model, nn.Module) else {}
    _check(model, max_length, method, tables)
    configs = _configs(model, tables)
    longer = {}  # by weight: tables may share one
    for table in tables:
        if len(table.weight) < max_length and table.weight not in longer:
            config = next(iter(configs[table]), None)
            longer[table.weight] = _longer(table.weight, max_length, method, config)
    for table, users in tables.items():
        table.weight = longer.get(table.weight, table.weight)
        table.num_embeddings = max_length
        for config in configs[table]:
            config.max_position_embeddings = max_length
            if hasattr(config, "n_ctx"):  # the same number in the configs of older GPT-2 checkpoints
                config.n_ctx = max_length
        for module in users:
            if isinstance(module, BertEmbeddings):
                device = table.weight.device
                module.position_ids = torch.arange(max_length, device=device).expand(1, -1)
                module.token_type_ids = torch.zeros(1, max_length, dtype=torch.long, device=device)
    if tokenizer is not None:
        tokenizer.model_max_length = max_length
    return model


def _model_class(config, sparse):
    """The class that `config` was saved from; for sparse attention, its class in this library."""
    name = (config.architectures or ["no class"])[0]
    owner = models if sparse or config.model_type.startswith("flash_") else transformers
    if owner is models and not name.startswith("Flash"):
        name = "Flash" + name
    found = getattr(owner, name, None)
    if not isinstance(found, type) or not issubclass(found, (BertPreTrainedModel, GPT2PreTrainedModel)):
        known = sorted(known for known in models.__all__ if known.startswith("Flash") and "Config" not in known)
        raise ValueError(
            f"the checkpoint's config.json names {name} ({config.model_type}), which convert does not know. It takes "
            f"BERT and GPT-2 checkpoints, and with a block-sparse pattern those that become one of {', '.join(known)}"
        )
    return found


def convert_checkpoint(name, folder, max_length=None, *, method="interpolate", block_sparse=None, revision=None):
    """Save the BERT or GPT-2 checkpoint `name` (folder or Hub id) to the new folder `folder`, longer or block-sparse.

    A dense result keeps its model type and loads without this library; a block-sparse one gets the model type of this
    library, because plain transformers would silently run it dense. Weights must be safetensors. The tokenizer comes
    along. max_length and method are those of `extend_context`; None keeps the length. block_sparse: a dict as in
    `layouts.from_config`. Returns the model.
    """
    if max_length is None and block_sparse is None:
        raise ValueError("nothing to convert: give a max_length, a block-sparse pattern or both")
    if block_sparse is not None:
        check_config(block_sparse)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is already there and not an empty folder; choose another for the result")
    source = {"pretrained_model_name_or_path": name, "revision": revision or "main"}
    config = transformers.AutoConfig.from_pretrained(**source)
    if block_sparse is not None:  # before the weights are fetched
        check_config(block_sparse, getattr(config, "num_attention_heads", None))
    model_class = _model_class(config, block_sparse is not None)
    options = {} if block_sparse is None else {"block_sparse": block_sparse}
    model = model_class.from_pretrained(**source, dtype="auto", use_safetensors=True, **options)
    tokenizer = None
    if any(_has_file(source, file) for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    if max_length is not None:
        extend_context(model, max_length, method=method, tokenizer=tokenizer)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model


def _has_file(source, file):
    return transformers.utils.hub.has_file(source["pretrained_model_name_or_path"], file, revision=source["revision"])
