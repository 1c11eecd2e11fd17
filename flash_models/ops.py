# SPDX-License-Identifier: Apache-2.0
"""`attention`: the public call, and what PyTorch must know about the two ops behind it.

The only file that calls them; those that make layouts are `_layout_ops.py`'s. They are registered by
kernels/attention/op.cpp, or by `_library.py` where there is no compiled library; their shapes without data (for
torch.compile and torch.export) and their gradient are registered here.
"""

import torch

from . import _library
from ._block_layout import LISTS
from ._checks import autocast_dtype, check_kv_range, check_layout, check_packed, check_qkv
from .reference import tokens_first

attention_fwd = torch.ops.flash_models.attention_fwd.default
attention_bwd = torch.ops.flash_models.attention_bwd.default


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    scale=None,
    dropout_p=0.0,
    kv_range=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    layout=None,
    heads_first=False,
    deterministic=False,
    return_lse=False,
):
    """Exact attention, softmax(scale * q k^T) v, in memory linear in the length (FlashAttention, arXiv 2205.14135).

    Args:
        q: (B, Sq, H, D), or packed (Tq, H, D) with `cu_seqlens_*`. bfloat16 or float16, on CPU also float32. Any
            strides whose last is 1: views of a packed QKV tensor are read in place. D a multiple of 8 up to 128.
        k, v: (B, Sk, H, D) or (Tk, H, D); the dtype and device of q.
        causal: query i sees key j iff j <= i + Sk - Sq (the last query sees every key), per sequence.
        scale: factor of the scores; 1 / sqrt(D) if None.
        dropout_p: probability in [0, 1) of dropping an attention weight, rounded to a multiple of 1/256; what is kept
            is scaled up by the rounded value. The mask is a function of torch's default generator on q's device, so
            `torch.manual_seed`, CUDA graphs and activation checkpointing behave as with `torch.nn.Dropout`.
        kv_range: int32 (B, 2), first and one-past-last valid key of each sequence: right and left padding.
        cu_seqlens_q, cu_seqlens_k: int32 (N + 1,), offsets of N packed sequences, from 0 to at most T.
        max_seqlen_q, max_seqlen_k: int, the longest packed sequence. May be left out on CPU.
        layout: BlockLayout; scores outside its blocks are never computed. Intersects with `causal` and `kv_range`. With
            packed sequences its blocks count from the start of each sequence.
        heads_first: q, k, v are (B, H, S, D) or (H, T, D), as models have them, read in place. Results are as without.
        deterministic: give bitwise the same gradients in every run, and on a CPU with any number of threads, at some
            cost. Also switched on by `torch.use_deterministic_algorithms`. The output is always bitwise reproducible.
        return_lse: also return the logarithm of each row's sum of exponentials.

    Returns:
        out (B, Sq, H, D) or (Tq, H, D), of q's dtype; with `return_lse` also lse, float32 (B, H, Sq) or (H, Tq),
        natural logarithm, through which no gradient flows. A query that sees no key gives out 0, lse -inf and
        gradient 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and what to do. Values of `kv_range` and
            `cu_seqlens_*` are checked on CPU, and on CUDA if the environment has FLASH_MODELS_STRICT=1 (a device sync);
            otherwise the kernels clamp them.
    """
    autocast = autocast_dtype(q)
    if autocast is not None:  # scaled_dot_product_attention does the same
        q, k, v = q.to(autocast), k.to(autocast), v.to(autocast)
    options = {}  # of the op, by name: what a plain call does without costs it nothing
    if not kv_range is cu_seqlens_q is cu_seqlens_k is layout is None:
        options = _checked_options(
            q, k, v, kv_range, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, layout, heads_first
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected a probability in [0, 1)")
    if dropout_p > 0.0:
        options["dropout_p"] = dropout_p
        options["rng_state"] = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=q.device)
    if scale is not None and scale < 0.0:
        q, scale = -q, -scale  # the kernels follow the maximum of the unscaled scores
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if torch.compiler.is_compiling():
        check_qkv(q, k, v, "cu_seqlens_q" in options, heads_first)
        out, lse = attention_fwd(q, k, v, scale, causal, deterministic, heads_first, **options)
    else:
        try:
            out, lse = _autograd(q, k, v, scale, causal, deterministic, heads_first, **options)
        except RuntimeError:  # the op checks its tensors: here in terms of the arguments what did not fit
            check_qkv(q, k, v, "cu_seqlens_q" in options, heads_first)
            raise
    return (out, lse) if return_lse else out


def _checked_options(
    q, k, v, kv_range, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, layout, heads_first
):  # fmt: skip
    """The op's arguments, by name, for padding, packed sequences and layouts."""
    options = {}
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_qkv(q, k, v, packed, heads_first)
    token_dim, head_dim = (-2, -3) if heads_first else (-3, -2)
    length_q, length_k, heads = q.shape[token_dim], k.shape[token_dim], q.shape[head_dim]
    k_lengths = None
    if packed:
        max_seqlen_q, max_seqlen_k, k_lengths = check_packed(
            q.device, length_q, length_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        )
        options |= {"cu_seqlens_q": cu_seqlens_q.contiguous(), "cu_seqlens_k": cu_seqlens_k.contiguous()}
        options |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    else:
        max_seqlen_q, max_seqlen_k = length_q, length_k
    if kv_range is not None:
        batch = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
        check_kv_range(kv_range, batch, q.device, max_seqlen_k, k_lengths)
        options["kv_range"] = kv_range.contiguous()
    if layout is not None:
        check_layout(layout, heads, max_seqlen_q, max_seqlen_k, q.device)
        if not layout.full:
            options |= {name: getattr(layout, name) for name in LISTS if getattr(layout, name) is not None}
            options["block_size"] = layout.block_size
    return options


@torch.library.register_fake("flash_models::attention_fwd")
def _(
    q, k, v, scale, causal, deterministic, heads_first, kv_range=None, dropout_p=0.0, rng_state=None, cu_seqlens_q=None,
    *_, **__,
):  # fmt: skip
    check_qkv(q, k, v, cu_seqlens_q is not None, heads_first)
    q = tokens_first(q, heads_first)
    return q.new_empty(q.shape), q.new_empty(q.transpose(-3, -2).shape[:-1], dtype=torch.float32)


@torch.library.register_fake("flash_models::attention_bwd")
def _(dout, out, lse, q, k, v, scale, causal, deterministic, heads_first, *_, **__):
    return tuple(tokens_first(t.new_empty(tokens_first(t, heads_first).shape), heads_first) for t in (q, k, v))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, settings, options):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = attention_fwd(q, k, v, *settings, **options)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # or every backward pass fills a gradient of lse with zeros
        ctx.names = [name for name, value in options.items() if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(out, lse, q, k, v, *map(options.pop, ctx.names))
        ctx.settings, ctx.options = settings, options
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * 5
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "flash_models.attention has no second derivative, which create_graph=True asks for: use "
                "scaled_dot_product_attention with torch.nn.attention.SDPBackend.MATH"
            )
        out, lse, q, k, v, *tensors = ctx.saved_tensors
        strides = dout.stride()
        if strides[-1] != 1 or 0 in strides:  # such as the gradient of out.sum()
            dout = dout.contiguous()
        options = {**ctx.options, **dict(zip(ctx.names, tensors, strict=True))}
        return *attention_bwd(dout, out, lse, q, k, v, *ctx.settings, **options), None, None


def _autograd(q, k, v, scale, causal, deterministic, heads_first, **options):
    """What runs for `attention_fwd` before the kernel of a backend.

    torch.library.register_autograd would do, but takes 0.2 ms for an op of 18 arguments, longer than small kernels.
    """
    settings = scale, causal, deterministic, heads_first
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, settings, options)
    with torch._C._AutoDispatchBelowAutograd():
        return attention_fwd(q, k, v, *settings, **options)


_OPTIONS = [argument.name for argument in attention_fwd._schema.arguments[7:]]


def _dispatched(q, k, v, scale, causal, deterministic, heads_first, *options):
    """`_autograd` as the dispatcher calls it, which knows the options by their place."""
    given = {name: value for name, value in zip(_OPTIONS, options, strict=False) if value is not None}
    return _autograd(q, k, v, scale, causal, deterministic, heads_first, **given)


_library.fragment.impl("attention_fwd", _dispatched, "Autograd")
