# SPDX-License-Identifier: Apache-2.0
"""What a caller of `attention` may get wrong, in terms of its arguments: what was got, what was expected, what to do.

The kernels clamp every offset they read, so a wrong value in a tensor on the GPU gives wrong numbers but never leaves
memory. Reading such values would make the GPU wait: it is done on CPU, and on CUDA when FLASH_MODELS_STRICT=1.
"""

import os

import torch

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = {"cuda": _HALF, "cpu": (*_HALF, torch.float32), "meta": (*_HALF, torch.float32)}


def _shape(t):
    return tuple(t.shape)


def _unsupported(dtype, device):
    if device.type not in _DTYPES:
        return NotImplementedError(
            f"q, k, v are on {device}; there are kernels for CPU and CUDA: use "
            "torch.nn.functional.scaled_dot_product_attention"
        )
    if device.type == "cuda" and dtype == torch.float32:
        return TypeError(
            "q, k, v are float32; the CUDA kernels take bfloat16 and float16: use .bfloat16() or torch.autocast, or "
            "torch.nn.functional.scaled_dot_product_attention for float32"
        )
    return TypeError(f"q, k, v are {dtype}; expected bfloat16 or float16, or on CPU also float32")


def autocast_dtype(t):
    """The dtype that autocast has attention over `t` computed in; None where it is off."""
    kind = "cuda" if t.is_cuda else "cpu"
    if not torch.is_autocast_enabled(kind) or t.device.type != kind:
        return None
    return torch.get_autocast_dtype(kind)


def check_qkv(q, k, v, packed, heads_first=False):
    q_shape, k_shape, dtype, device = q.shape, k.shape, q.dtype, q.device
    rank = 3 if packed else 4
    if len(q_shape) != rank or len(k_shape) != rank or v.dim() != rank:
        dimensions = "{1}, {0}, head_dim" if heads_first else "{0}, {1}, head_dim"
        expected = (
            f"({dimensions}), because cu_seqlens_q and cu_seqlens_k are given".format("tokens", "heads")
            if packed
            else f"(batch, {dimensions}); packed sequences (3 dimensions) need cu_seqlens_q, cu_seqlens_k".format(
                "sequence", "heads"
            )
        )
        raise ValueError(f"q, k, v have shapes {_shape(q)}, {_shape(k)}, {_shape(v)}; expected {expected}")
    if k.dtype != dtype or v.dtype != dtype:
        raise TypeError(f"q, k, v have dtypes {dtype}, {k.dtype}, {v.dtype}; expected one: convert with .to(dtype)")
    if k.device != device or v.device != device:
        raise ValueError(f"q, k, v are on {device}, {k.device}, {v.device}; expected one: move with .to(device)")
    if dtype not in _DTYPES.get(device.type, ()):
        raise _unsupported(dtype, device)
    heads_dim = -3 if heads_first else -2
    heads, head_dim = q_shape[heads_dim], q_shape[-1]
    if head_dim % 8 != 0 or not 8 <= head_dim <= 128:
        raise ValueError(
            f"head_dim is {head_dim}; expected a multiple of 8 from 8 to 128: pad the last dimension of q, k and v "
            "with zeros and pass scale explicitly"
        )
    if k_shape != v.shape:
        raise ValueError(f"k has shape {_shape(k)} and v {_shape(v)}; expected the same shape")
    if k_shape[heads_dim] != heads:
        raise ValueError(
            f"q has {heads} heads, k and v have {k_shape[heads_dim]}; expected the same number. For grouped queries "
            f"repeat the heads: k.repeat_interleave(q_heads // k_heads, dim={heads_dim}), the same for v"
        )
    if k_shape[-1] != head_dim or not packed and k_shape[0] != q_shape[0]:
        raise ValueError(f"q has shape {_shape(q)}, k and v {_shape(k)}; expected the same batch, heads and head_dim")
    strides = q.stride()[-1], k.stride()[-1], v.stride()[-1]
    if strides != (1, 1, 1):
        raise ValueError(
            "the last dimension of q, k, v has strides {}, {}, {}; expected 1: call .contiguous() on the tensor whose "
            "stride is not 1".format(*strides)
        )


def _values(t):
    """The values of a small tensor as a list; None while tracing, and where reading them would make the GPU wait."""
    if torch.compiler.is_compiling() or type(t) is not torch.Tensor:
        return None
    if t.device.type == "cpu":
        return t.tolist()
    strict = t.device.type == "cuda" and os.environ.get("FLASH_MODELS_STRICT") == "1"
    return t.tolist() if strict and not torch.cuda.is_current_stream_capturing() else None


def _check_int32(name, t, shape, device):
    if t.dtype != torch.int32:
        raise TypeError(f"{name} is {t.dtype}; expected torch.int32: convert with .int()")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, q on {device}; expected one device: move with .to(q.device)")
    if t.shape != shape:
        raise ValueError(f"{name} has shape {_shape(t)}; expected {tuple(shape)}")


def _lengths(name, cu_seqlens, tokens):
    offsets = _values(cu_seqlens)
    if offsets is None:
        return None
    lengths = [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)]
    if offsets[0] != 0 or min(lengths, default=0) < 0 or offsets[-1] > tokens:
        raise ValueError(
            f"{name} is {offsets if len(offsets) <= 16 else f'{offsets[:8]} ... {offsets[-8:]}'}; expected offsets "
            f"that start at 0, never decrease and end at most at the {tokens} tokens of the tensor"
        )
    return lengths


def _max_seqlen(name, max_seqlen, lengths):
    longest = None if lengths is None else max(lengths, default=0)
    if max_seqlen is None:
        if longest is None:
            raise ValueError(
                f"{name} is missing; packed sequences need the longest length as an int (reading it from cu_seqlens "
                "would make the GPU wait, and is impossible while compiling)"
            )
        return longest
    if isinstance(max_seqlen, torch.Tensor):
        raise TypeError(f"{name} is a tensor; expected an int: call .item() once, where waiting for the GPU is fine")
    if longest is not None and longest > max_seqlen or max_seqlen < 0:
        raise ValueError(f"{name} is {max_seqlen}; expected at least the longest sequence, {longest or 0} tokens")
    return max_seqlen


def check_packed(device, tokens_q, tokens_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """(max_seqlen_q, max_seqlen_k, lengths of the key sequences where they could be read)."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing} is missing; expected both or neither: self-attention passes one tensor twice")
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 1:
        raise ValueError(f"cu_seqlens_q has shape {_shape(cu_seqlens_q)}; expected (number of sequences + 1,)")
    _check_int32("cu_seqlens_q", cu_seqlens_q, cu_seqlens_q.shape, device)
    _check_int32("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, device)
    q_lengths = _lengths("cu_seqlens_q", cu_seqlens_q, tokens_q)
    k_lengths = _lengths("cu_seqlens_k", cu_seqlens_k, tokens_k)
    max_seqlen_q = _max_seqlen("max_seqlen_q", max_seqlen_q, q_lengths)
    return max_seqlen_q, _max_seqlen("max_seqlen_k", max_seqlen_k, k_lengths), k_lengths


def check_kv_range(kv_range, batch, device, seqlen_k, k_lengths):
    _check_int32("kv_range", kv_range, (batch, 2), device)
    for b, pair in enumerate(_values(kv_range) or ()):
        limit = seqlen_k if k_lengths is None else k_lengths[b]
        if not (0 <= pair[0] <= limit and 0 <= pair[1] <= limit):
            raise ValueError(
                f"kv_range[{b}] is {pair}; expected the first and one past the last valid key, from 0 to {limit} "
                "(an empty range is allowed)"
            )


def check_layout(layout, heads, seqlen_q, seqlen_k, device):
    block_size = layout.block_size
    if block_size not in (64, 128):
        raise ValueError(f"layout.block_size is {block_size}; expected 64 or 128")
    rows, columns = -(-layout.seqlen_q // block_size), -(-layout.seqlen_k // block_size)
    if rows != -(-seqlen_q // block_size) or columns != -(-seqlen_k // block_size):
        raise ValueError(
            f"the layout has {rows} x {columns} blocks of {block_size}; {seqlen_q} queries and {seqlen_k} keys need "
            f"{-(-seqlen_q // block_size)} x {-(-seqlen_k // block_size)}: build it for these lengths (for packed "
            "sequences: pass max_seqlen_q and max_seqlen_k of the layout)"
        )
    if torch.compiler.is_compiling():  # torch 2.11 cannot guard sizes of lists that are constants of a graph
        return
    lists = layout.num_heads
    if lists != 1 and lists != heads:
        raise ValueError(f"the layout has {lists} heads, q has {heads}; expected 1 (shared by all heads) or {heads}")
    if layout.row_start.device != device:
        raise ValueError(
            f"the layout is on {layout.row_start.device}, q on {device}; expected one: build it with device=q.device"
        )
