# SPDX-License-Identifier: Apache-2.0
"""What happens around the forward of a BERT or GPT-2 on the kernels: hooks, which are copied and pickled with it."""

import inspect

import torch
from transformers import BertModel, GPT2Model

from .configuration import IO_AWARE

# names of the positional arguments of forward
_NAMES = {cls: tuple(inspect.signature(cls.forward).parameters)[1:] for cls in (BertModel, GPT2Model)}


def may_look(tensor):
    """Whether `tensor` can be read on the host: not while torch.compile traces or a CUDA graph is captured."""
    return not (torch.compiler.is_compiling() or tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _packed_lengths(position_ids):
    """The lengths of the documents that position_ids (1, T), on the host, count from 0 one after the other; or None."""
    positions = position_ids[0]
    starts = (positions == 0).nonzero()[:, 0]
    if not 0 < len(starts) < max(len(positions), 2) or starts[0] != 0:
        return None
    lengths = torch.diff(starts, append=torch.tensor([len(positions)]))
    counted = torch.arange(len(positions)) - starts.repeat_interleave(lengths)
    return lengths if torch.equal(positions.long(), counted) else None


def packed_arguments(lengths, device):
    """What tells attention where packed sequences end; lengths: int (N,) on the host."""
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device, non_blocking=True)
    longest = int(lengths.max())
    names = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
    return dict(zip(names, (offsets, offsets, longest, longest), strict=True))


def _find_documents(module, position_ids):
    """Arguments that keep the documents that position_ids (1, T) packs apart; None if nothing is packed in a known way.

    The positions are looked at on the host, one wait. Where that is not possible, a 4-D mask says the same.
    """
    if not may_look(position_ids):
        document = (position_ids == 0).cumsum(1)
        mask = document[:, None, :, None] == document[:, None, None, :]
        causal = isinstance(module, GPT2Model) or module.config.is_decoder
        return {"attention_mask": mask.tril() if causal else mask}
    lengths = _packed_lengths(position_ids.cpu())
    if lengths is None:
        return None
    return packed_arguments(lengths, position_ids.device) if len(lengths) > 1 else {}


def before_model(module, args, kwargs):
    """Forward pre-hook of a BertModel or GPT2Model: keeps packed documents apart and lets attention weights through.

    Documents packed into a batch of 1 show in `position_ids` that start again at 0, without a mask or a cache.
    transformers ignores them in BERT, and in GPT-2 where a cache is made, which is its default.

    For GPT-2 it also keeps transformers from making a Q x K mask that the kernels do not need. Without a mask and
    without a cache transformers looks for packed sequences in position_ids and, if it finds some or cannot look because
    torch.compile traces, makes such a mask. It does not look where a 4-D mask is given. So one is, of a dtype that no
    mask has, where it is known what is packed.
    """
    if module.config._attn_implementation != IO_AWARE:
        return None
    if args:
        names = _NAMES[GPT2Model if isinstance(module, GPT2Model) else BertModel]
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    get = kwargs.get
    if get("output_attentions"):
        kwargs["attention_weights"] = True  # GPT2Model keeps output_attentions to itself
    inputs = get("input_ids") if get("inputs_embeds") is None else get("inputs_embeds")
    given = get("attention_mask") is not None or get("past_key_values") is not None
    if given or inputs is None:
        return args, kwargs
    position_ids, known = get("position_ids"), True
    if position_ids is not None and get("cu_seq_lens_q") is None:
        known = False
        if position_ids.dim() == 2 and inputs.shape[0] == position_ids.shape[0] == 1 and inputs.shape[1] > 1:
            found = _find_documents(module, position_ids)
            known = found is not None
            kwargs.update(found or {})
    if known and isinstance(module, GPT2Model) and get("attention_mask") is None:
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.uint8, device=inputs.device)
    return args, kwargs


def no_cache_in_training(module, args, kwargs):
    """Forward pre-hook of a BertModel or GPT2Model: config.use_cache is meant for generate; in training a cache would
    copy every key and value for nothing."""
    if module.training and len(args) < 2 and kwargs.get("past_key_values") is kwargs.get("use_cache") is None:
        kwargs["use_cache"] = False
    return args, kwargs


def drop_padding(module, args, kwargs):
    """Forward pre-hook of a BertModel that is to compute on real tokens only, after `before_model`.

    Replaces a padding mask by what packs its valid tokens. Leaves alone what needs the padded shape: a decoder, cross-
    attention, results of every layer, chunked feed-forward, a pooler that is to read padding, a block-sparse pattern
    that would begin at another token; and masks that it cannot look at.
    """
    config, mask = module.config, kwargs.get("attention_mask")
    per_layer = any(
        kwargs.get(name, getattr(config, name, False)) for name in ("output_attentions", "output_hidden_states")
    )
    other = config.is_decoder or config.chunk_size_feed_forward or kwargs.get("encoder_hidden_states") is not None
    if config._attn_implementation != IO_AWARE or per_layer or other:
        return None
    if mask is None or mask.dim() != 2 or not may_look(mask):
        return None
    valid = mask.bool().cpu()  # the one wait
    if module.pooler is not None and not valid[:, 0].all():
        return None
    if getattr(config, "block_sparse", None) is not None and (valid[:, 1:] > valid[:, :-1]).any():
        return None
    kwargs["attention_mask"] = None
    if not valid.all():
        index = valid.flatten().nonzero()[:, 0].to(mask.device, non_blocking=True)
        kwargs.update(packed_arguments(valid.sum(1), mask.device), real_tokens=(index, valid.shape))
    return args, kwargs


def gather_tokens(module, args, kwargs):
    """Forward pre-hook of the BertEncoder: its input (B, S, hidden) becomes the real tokens (1, T, hidden)."""
    if kwargs.get("real_tokens") is None:
        return None
    index, _ = kwargs["real_tokens"]
    hidden_states, *rest = args
    return (hidden_states.flatten(0, 1).index_select(0, index)[None], *rest), kwargs


def scatter_tokens(module, args, kwargs, output):
    """Forward hook of the BertEncoder: its output (1, T, hidden) back to (B, S, hidden), 0 where there is padding."""
    if kwargs.get("real_tokens") is None:
        return
    index, shape = kwargs["real_tokens"]
    tokens = output.last_hidden_state[0]
    padded = tokens.new_zeros(shape.numel(), tokens.shape[-1]).index_copy(0, index, tokens)
    output.last_hidden_state = padded.unflatten(0, shape)


def install(model, unpad=False, no_cache=False):
    """Hook `model`, a BertModel or GPT2Model. Returns [(name of a submodule, id of its hook)], for `remove`."""
    present = model._forward_pre_hooks.values()
    before = () if before_model in present else (("", before_model),)
    if no_cache and no_cache_in_training not in present:
        before = (("", no_cache_in_training), *before)
    if unpad and drop_padding not in present:
        before += ("", drop_padding), ("encoder", gather_tokens)
    ids = []
    for name, hook in before:
        handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        ids.append((name, handle.id))
        if hook is gather_tokens:
            handle = model.encoder.register_forward_hook(scatter_tokens, with_kwargs=True)
            ids.append((name, handle.id))
    return ids


def remove(model, ids):
    """Take back what `install` did."""
    for name, number in ids:
        module = model.get_submodule(name)
        for hooks in (
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
        ):
            hooks.pop(number, None)
