# SPDX-License-Identifier: Apache-2.0
"""The attention of Hugging Face models, on this library's kernels.

Importing this module registers the implementation `io_aware` with transformers: a function that makes masks and a
function that attends. A model uses it with `attn_implementation="io_aware"`, or after `patch(model)`.
"""

import os
import warnings

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, BertModel, GPT2Model
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.models.bert.modeling_bert import BertCrossAttention, BertPreTrainedModel, BertSelfAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2PreTrainedModel

from . import layouts
from ._config_layout import config_layout
from ._sdpa import sdpa_attention, why_not_kernel
from .models import fusing, hooks
from .models.configuration import IO_AWARE
from .models.hooks import may_look
from .models.rotary import is_rotary, rotary_tables, rotate
from .ops import attention

_HOLES = (
    "an attention_mask has padding between valid tokens, and a compiled model or a CUDA graph cannot look at it to "
    "choose another attention; move the padding to the ends or pass a 4-D mask"
)
_warned = set()


@torch.compiler.assume_constant_result  # so that torch.compile warns while tracing and leaves nothing in the graph
def _report_fallback(reason):
    """Warn once per reason that PyTorch's attention is used; with FLASH_MODELS_STRICT=1 raise instead."""
    message = f"flash_models uses PyTorch's scaled_dot_product_attention (the result is the same) because of {reason}"
    if os.environ.get("FLASH_MODELS_STRICT") == "1":
        raise RuntimeError(message + "; FLASH_MODELS_STRICT=1 makes this an error")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(message, stacklevel=2)


def key_range(mask):
    """First and one-past-last True of every row of `mask`, bool (B, K), and whether there is a False between them.

    Returns int32 (B, 2), an empty range for a row without a True, and bool (B,).
    """
    length = mask.shape[1]
    place = torch.arange(length, dtype=torch.int32, device=mask.device)
    end = torch.where(mask, place + 1, 0).amax(1)
    start = torch.where(mask, place, length).amin(1).minimum(end)
    return torch.stack([start, end], 1), end - start != mask.sum(1)


def attention_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    **kwargs,
):
    """The mask that transformers hands to `attention_forward`, made once per forward of a model.

    None: every key is valid. int32 (B, 2): first and one-past-last valid key, for padding at one or both ends. 4-D
    bool (True: visible): everything else, such as padding with holes, packed `position_ids` or a static cache, which
    PyTorch's attention then takes.

    A mask is looked at on the host, one wait per forward. Inside torch.compile and CUDA graphs that is not possible:
    there it is taken as padding at the ends, and a mask with holes fails a device-side assertion.
    """
    causal = mask_function is causal_mask_function
    plain = causal or mask_function is bidirectional_mask_function
    static = isinstance(q_offset, torch.Tensor) or (causal and kv_length != q_offset + q_length)
    fits = attention_mask is None or attention_mask.shape[1] == kv_length
    if plain and not static and not kv_offset and fits:
        if attention_mask is None:
            return None
        if not may_look(attention_mask):
            kv_range, holes = key_range(attention_mask)
            torch._assert_async(~holes.any(), _HOLES)
            return kv_range
        on_host = attention_mask.cpu()  # one wait and small work there, instead of a dozen kernels and a wait
        if on_host.all():
            return None
        kv_range, holes = key_range(on_host)
        if not holes.any():
            return kv_range.to(attention_mask.device, non_blocking=True)
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)


def _is_self_attention(module):
    # GPT-2's has an attribute; getattr would search parameters and submodules of those that have none
    return not (isinstance(module, BertCrossAttention) or vars(module).get("is_cross_attention", False))


def _fields(config):
    """The attributes of a config, around the method that transformers has every look at one go through."""
    return vars(config) if torch.compiler.is_compiling() else object.__getattribute__(config, "__dict__")


def _packed_sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, query, key, is_self_attention):
    """The arguments of the packed call (`DataCollatorWithFlattening(return_flash_attn_kwargs=True)`)."""
    if query.shape[0] != 1 or not is_self_attention:
        raise ValueError(
            "cu_seq_lens_q packs sequences into a batch of 1 for self-attention; got "
            + (f"a batch of {query.shape[0]}" if is_self_attention else "cross-attention")
        )
    return {
        "cu_seqlens_q": cu_seqlens_q.to(torch.int32),
        "cu_seqlens_k": (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).to(torch.int32),
        "max_seqlen_q": max_seqlen_q or query.shape[2],
        "max_seqlen_k": max_seqlen_k or key.shape[2],
    }


def _split_mask(mask):
    """(kv_range, 4-D mask), at most one of them not None, of what `attention_forward` takes as attention_mask."""
    if mask.dim() == 4 and mask.dtype == torch.uint8:  # from _spare_packed_mask
        return None, None
    if mask.dim() == 4:
        return None, mask
    if mask.dim() == 2 and mask.dtype == torch.int32:
        return mask, None
    if mask.dim() == 2 and mask.dtype == torch.bool:
        kv_range, holes = key_range(mask)
        torch._assert_async(~holes.any(), _HOLES)
        return kv_range, None
    raise ValueError(
        f"attention_mask must be 4-D, bool (B, Sk) or an int32 (B, 2) key range, got {mask.dtype} of shape "
        f"{tuple(mask.shape)}"
    )


def _rotated(config, query, key):
    """query (B, H, Sq, D) and key (B, H, Sk, D), turned to their positions; the queries are the last of the keys."""
    q_length, k_length = query.shape[2], key.shape[2]
    cos, sin = rotary_tables(config, k_length, query.shape[3], query.device)
    query = rotate(query.transpose(1, 2), cos[k_length - q_length :], sin[k_length - q_length :])
    return query.transpose(1, 2), rotate(key.transpose(1, 2), cos, sin).transpose(1, 2)


def attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, position_bias=None,
    cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None, output_attentions=None,
    attention_weights=None, softcap=None, s_aux=None, **_,
):  # fmt: skip
    """What a Hugging Face attention module calls under the name `io_aware`.

    query (B, H, Sq, D), key and value (B, H, Sk, D), read in place through their strides. attention_mask: None, int32
    (B, 2) or 4-D, see `attention_mask`, or a 2-D bool key mask (B, Sk) whose valid keys are contiguous. Packed
    sequences: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`. Returns (out (B, Sq, H, D), weights):
    None, because the kernels never form them, or with `output_attentions` those of PyTorch's attention (B, H, Sq, Sk).
    """
    if softcap is not None or s_aux is not None:
        unsupported = "s_aux" if softcap is None else "softcap"
        raise ValueError(f"{IO_AWARE} attention has no {unsupported}; load the model with attn_implementation='eager'")
    is_self_attention = _is_self_attention(module)
    kv_range = mask = packed = layout = None
    if attention_mask is not None:
        kv_range, mask = _split_mask(attention_mask)
    if cu_seq_lens_q is not None:
        packed = _packed_sequences(
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, query, key, is_self_attention
        )
        if kv_range is not None:
            raise ValueError(
                "got attention_mask and cu_seq_lens_q, but packed sequences hold no padding: drop the mask"
            )
    if is_causal is None or not is_self_attention:
        is_causal = getattr(module, "is_causal", True)
    config = getattr(module, "config", None)
    fields = _fields(config) if is_self_attention and config is not None else ()
    if "rotary_max_wavelength" in fields or "block_sparse" in fields:
        k_length = key.shape[2]
        unknown_positions = mask is not None and query.shape[2] != k_length
        if is_rotary(config):
            if unknown_positions:
                raise ValueError("rotary positions do not combine with a static cache; use the default dynamic cache")
            if packed is not None and config.position_embedding_type == "rotary_2d":
                raise ValueError("rotary_2d does not combine with packed sequences; batch the images instead")
            query, key = _rotated(config, query, key)
        layout_length = k_length if packed is None else packed["max_seqlen_k"]
        layout = config_layout(config, layout_length, query.shape[1], query.device)
        if layout is not None and unknown_positions:
            raise ValueError("block_sparse does not combine with a static cache; use the default dynamic cache")
    with_weights = bool(output_attentions or attention_weights)
    reason = "output_attentions" if with_weights else why_not_kernel(query, key, value, mask, position_bias)
    if reason is None and layout is not None and packed is None and query.shape[2] != key.shape[2]:
        reason = "block_sparse with a key-value cache"
    if reason is not None:
        _report_fallback(reason)
        return sdpa_attention(
            query, key, value, mask, position_bias, is_causal, kv_range, packed, layout, dropout, scaling, with_weights
        )
    if packed is not None:
        query, key, value = query[0], key[0], value[0]
    out = attention(
        query, key, value, causal=is_causal, scale=scaling, dropout_p=dropout, kv_range=kv_range, layout=layout,
        heads_first=True, **(packed or {}),
    )  # fmt: skip
    return (out if packed is None else out[None]), None


AttentionInterface.register(IO_AWARE, attention_forward)
AttentionMaskInterface.register(IO_AWARE, attention_mask)


_ATTENTION_CLASSES = (BertSelfAttention, BertCrossAttention, GPT2Attention)
_PATCHABLE_CLASSES = (*_ATTENTION_CLASSES, BertPreTrainedModel, GPT2PreTrainedModel)
_BEFORE_PATCH = "_before_io_aware_patch"
_NOT_SET = "not set"


def patch(model, block_sparse=None, unpad=False, fuse=False):
    """Switch every BERT and GPT-2 inside `model` to this library's attention, in place. Returns `model`.

    model: any nn.Module that holds Hugging Face BERT or GPT-2 layers. Weights, outputs and the saved checkpoint stay
    what they were. block_sparse: None, or a dict as in `layouts.from_config`, which is stored in the models' configs;
    self-attention then sees only the blocks of the pattern. unpad: every BERT encoder computes on the real tokens of
    the attention_mask only, in all its layers; what it returns for padding is 0. A decoder, a call that asks for the
    results of every layer, and a compiled model keep the padding; for the last, pack the batches instead
    (`DataCollatorForPackedMaskedLM`). `unpatch(model)` restores the model.

    fuse: True, or some of {"gelu", "norm", "qkv", "cross_entropy", "cache"}, for fewer passes over memory in a training
    step: bias and GELU; bias, dropout, residual and LayerNorm; queries, keys and values; the projection to the
    vocabulary and its cross-entropy, of tokens with a label only; and no key-value cache in training. With
    "cross_entropy" the `logits` that a language model returns in training are a `flash_models.models.logits.Logits`,
    computed when they are read; in evaluation they are a tensor as ever. Adapters, quantized layers and hooks keep
    working: what is not a plain layer is called as such.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(module, _ATTENTION_CLASSES) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} holds no Hugging Face BERT or GPT-2 attention, so there is nothing to patch. "
            f"Other transformers models can use the kernels through model.set_attn_implementation({IO_AWARE!r})"
        )
    fusions = fusing.check_fusions(fuse)
    patched = [module for module in model.modules() if isinstance(module, _PATCHABLE_CLASSES)]
    if any(module.config.output_attentions for module in patched):
        raise ValueError(
            "config.output_attentions is True, but the kernels never form the attention weights; set it to False first "
            "and pass output_attentions=True to the calls that need them"
        )
    if unpad and not any(isinstance(module, BertModel) for module in patched):
        raise ValueError(f"unpad=True is for BERT encoders, and {type(model).__name__} holds none")
    if block_sparse is not None:
        for module in patched:
            layouts.check_config(block_sparse, module.config.num_attention_heads)
    for module in patched:
        config = module.config
        before = getattr(module, _BEFORE_PATCH, None)
        if before is None:
            before = config._attn_implementation, getattr(config, "block_sparse", _NOT_SET), []
            setattr(module, _BEFORE_PATCH, before)
        if isinstance(module, (BertModel, GPT2Model)):
            before[2].extend(hooks.install(module, unpad and isinstance(module, BertModel), "cache" in fusions))
    for module in patched:  # a config is shared by many modules: all have been read before the first is written
        module.config._attn_implementation = IO_AWARE
        if block_sparse is not None:
            module.config.block_sparse = dict(block_sparse)
    fusing.install(model, fusions)
    return model


def unpatch(model):
    """Undo `patch(model)`, in place: attention and configs are as before. Returns `model`."""
    fusing.remove(model)
    for module in model.modules():
        if not hasattr(module, _BEFORE_PATCH):
            continue
        implementation, block_sparse, installed = getattr(module, _BEFORE_PATCH)
        delattr(module, _BEFORE_PATCH)
        hooks.remove(module, installed)
        module.config._attn_implementation = implementation
        if block_sparse != _NOT_SET:
            module.config.block_sparse = block_sparse
        elif hasattr(module.config, "block_sparse"):
            del module.config.block_sparse
    return model
