# SPDX-License-Identifier: Apache-2.0
"""`attention`: the public call, and what PyTorch must know about the two ops behind it.

The only file that calls `torch.ops.flash_models`. The ops are registered by kernels/attention/op.cpp, or by
`_library.py` where there is no compiled library; their shapes without data (for torch.compile and torch.export) and
their gradient are registered here.
"""

import torch

from . import _library
from ._checks import check_kv_range, check_layout, check_packed, check_qkv

attention_fwd = torch.ops.flash_models.attention_fwd.default
attention_bwd = torch.ops.flash_models.attention_bwd.default

_DENSE = (None, None, None, None, None, None, 0)  # as `BlockLayout.op_arguments`


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
        deterministic: give bitwise the same gradients in every run, at some cost. Also switched on by
            `torch.use_deterministic_algorithms`. The output is always bitwise reproducible.
        return_lse: also return the logarithm of each row's sum of exponentials.

    Returns:
        out, of q's shape and dtype; with `return_lse` also lse, float32 (B, H, Sq) or (H, Tq), natural logarithm,
        through which no gradient flows. A query that sees no key gives out 0, lse -inf and gradient 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and what to do. Values of `kv_range` and
            `cu_seqlens_*` are checked on CPU, and on CUDA if the environment has FLASH_MODELS_STRICT=1 (a device sync);
            otherwise the kernels clamp them.
    """
    device = q.device
    if device.type in ("cuda", "cpu") and torch.is_autocast_enabled(device.type):
        # scaled_dot_product_attention does the same
        dtype = torch.get_autocast_dtype(device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_qkv(q, k, v, packed)
    k_lengths = None
    if packed:
        max_seqlen_q, max_seqlen_k, k_lengths = check_packed(
            q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        )
        batch = cu_seqlens_q.shape[0] - 1
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    else:
        batch, max_seqlen_q, max_seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    if kv_range is not None:
        check_kv_range(kv_range, batch, device, max_seqlen_k, k_lengths)
        kv_range = kv_range.contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale < 0.0:
        q, scale = -q, -scale  # the kernels follow the maximum of the unscaled scores
    blocks = _DENSE
    if layout is not None:
        check_layout(layout, q.shape[-2], max_seqlen_q, max_seqlen_k, device)
        blocks = layout.op_arguments()
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected a probability in [0, 1)")
    rng_state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device) if dropout_p > 0.0 else None
    # Eager calls go straight to what the dispatcher would call back into Python for, which saves 3 us.
    run = attention_fwd if torch.compiler.is_compiling() else _autograd
    out, lse = run(
        q,
        k,
        v,
        kv_range,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        *blocks,
        rng_state,
        dropout_p,
        scale,
        causal,
        deterministic or torch.are_deterministic_algorithms_enabled(),
    )
    return (out, lse) if return_lse else out


@torch.library.register_fake("flash_models::attention_fwd")
def _(q, k, v, kv_range, cu_seqlens_q, *rest):
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens_q is None else (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("flash_models::attention_bwd")
def _(dout, out, lse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, options):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = attention_fwd(q, k, v, *options)
        ctx.mark_non_differentiable(lse)
        kv_range, cu_seqlens_q, cu_seqlens_k, _, _, *lists, _, rng_state = options[:13]
        ctx.save_for_backward(out, lse, q, k, v, kv_range, cu_seqlens_q, cu_seqlens_k, *lists, rng_state)
        ctx.max_seqlens, ctx.block_size, ctx.settings = options[3:5], options[11], options[13:]
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "flash_models.attention has no second derivative, which create_graph=True asks for: use "
                "scaled_dot_product_attention with torch.nn.attention.SDPBackend.MATH"
            )
        out, lse, q, k, v, kv_range, cu_seqlens_q, cu_seqlens_k, *lists, rng_state = ctx.saved_tensors
        if dout.stride(-1) != 1 or 0 in dout.stride():  # such as the gradient of out.sum()
            dout = dout.contiguous()
        options = kv_range, cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens, *lists, ctx.block_size, rng_state
        return *attention_bwd(dout, out, lse, q, k, v, *options, *ctx.settings), None


def _autograd(q, k, v, *options):
    """What the dispatcher runs for `attention_fwd` before the kernel of a backend.

    torch.library.register_autograd would do, but takes 0.2 ms for an op of 18 arguments, longer than small kernels.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, options)
    with torch._C._AutoDispatchBelowAutograd():
        return attention_fwd(q, k, v, *options)


_library.fragment.impl("attention_fwd", _autograd, "Autograd")
