# SPDX-License-Identifier: Apache-2.0
"""The block layout of a model: from its config, also while torch.compile traces."""

import operator

import torch

from . import layouts
from ._block_layout import LISTS


@torch.compiler.assume_constant_result  # so that torch.compile makes the lists while tracing: constants of the graph
def _constant_layout(fields, seqlen, num_heads, device):
    fields = dict(fields)
    if "heads" in fields:
        fields["heads"] = [dict(head) for head in fields["heads"]]
    layout = layouts.from_config(fields, seqlen, seqlen, device, num_heads)
    if torch.compiler.is_compiling():
        # What torch._dynamo.mark_static does, which cannot be called while tracing. Else dynamic=True makes symbols of
        # the sizes of these constants, to which no argument gives a value.
        for name in LISTS:
            if getattr(layout, name) is not None:
                getattr(layout, name)._dynamo_static_indices = {0, 1}
    return layout


def _constants(fields, num_global_tokens):
    """`fields` as a tuple of constants. grid_2d gets its global tokens from the model."""
    if fields["pattern"] == "grid_2d":
        fields = {"global": num_global_tokens, **fields}
    constants = []
    for name in sorted(fields):
        value = fields[name]
        if name == "heads":
            value = tuple(_constants(head, num_global_tokens) for head in value)
        elif name != "pattern":
            value = operator.index(value)  # makes torch.compile treat an integer as a constant of the graph
        constants.append((name, value))
    return tuple(constants)


def _is_image(fields):
    return fields["pattern"] == "grid_2d" or any(head["pattern"] == "grid_2d" for head in fields.get("heads", ()))


def config_layout(config, seqlen, num_heads, device):
    """The layout of `config.block_sparse` for `seqlen` tokens and `num_heads` heads, or None."""
    fields = getattr(config, "block_sparse", None)
    if fields is None:
        return None
    if _is_image(fields):
        seqlen = operator.index(seqlen)
    else:  # one layout serves all lengths of the same number of blocks
        block_size = fields.get("block_size", 128)
        seqlen = operator.index(-(-seqlen // block_size)) * block_size
    constants = _constants(fields, getattr(config, "num_global_tokens", 0))
    return _constant_layout(constants, seqlen, num_heads, device)
