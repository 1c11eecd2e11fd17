# SPDX-License-Identifier: Apache-2.0
"""PyTorch's scaled_dot_product_attention under the rules of `attention`, for what the kernels do not take."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from ._checks import autocast_dtype
from ._library import no_kernel_reason

_HALF = (torch.bfloat16, torch.float16)


def why_not_kernel(query, key, value, mask, position_bias):
    """The reason, as the end of a sentence, why the kernels do not take this call; None if they do."""
    if mask is not None:
        return (
            "a 4-D attention mask (given by the caller, or needed for padding with holes, a static cache, or "
            "position_ids that may be packed, of a model that is not patched or was not given cu_seq_lens_q)"
        )
    if position_bias is not None:
        return "an additive position bias"
    no_kernel = no_kernel_reason(query.device)
    if no_kernel is not None:
        return f"a missing kernel: {no_kernel}"
    dtype = query.dtype  # first, for asking autocast takes longer
    if dtype not in _HALF and not (dtype == torch.float32 and query.is_cpu) and autocast_dtype(query) not in _HALF:
        return f"the dtype {dtype} on {query.device.type} (use bfloat16, float16 or torch.autocast)"
    _, heads, _, head_dim = query.shape
    if head_dim % 8 or head_dim > 128 or value.shape[3] != head_dim:
        return f"the head dim {head_dim} of queries and {value.shape[3]} of values (a multiple of 8 up to 128 for both)"
    if query.stride()[3] != 1 or key.stride()[3] != 1 or value.stride()[3] != 1:
        return "a last dimension of q, k or v that is not contiguous"
    if key.shape[1] != heads:
        return f"grouped heads, {heads} of queries and {key.shape[1]} of keys"
    return None


def _visible(q_length, k_length, causal, kv_range, packed, layout, device):
    """Which key each query sees: bool, broadcasts to (B, H, Q, K)."""
    row = torch.arange(k_length - q_length, k_length, device=device)  # positions on the axis of the keys
    col = torch.arange(k_length, device=device)
    visible = torch.ones(1, 1, q_length, k_length, dtype=torch.bool, device=device)
    if packed is not None:  # positions become those within the sequence
        ends_q, ends_k, starts_k = packed["cu_seqlens_q"][1:], packed["cu_seqlens_k"][1:], packed["cu_seqlens_k"][:-1]
        token = torch.arange(q_length, device=device)
        row_sequence = torch.bucketize(token, ends_q, right=True)
        col_sequence = torch.bucketize(col, ends_k, right=True)
        owned = (row_sequence < len(ends_q))[:, None] & (col_sequence < len(ends_k))
        visible = visible & owned & (row_sequence[:, None] == col_sequence)
        row_sequence, col_sequence = row_sequence.clamp(max=len(ends_q) - 1), col_sequence.clamp(max=len(ends_k) - 1)
        row = token - ends_q[row_sequence] + (ends_k - starts_k)[row_sequence]
        col = col - starts_k[col_sequence]
    if causal:
        visible = visible & (col <= row[:, None])
    if kv_range is not None:
        visible = visible & (kv_range[:, 0, None, None, None] <= col) & (col < kv_range[:, 1, None, None, None])
    if layout is not None:
        blocks = layout.to_dense()
        row_block = (row // layout.block_size).clamp(0, blocks.shape[1] - 1)
        visible = visible & blocks[:, row_block[:, None], (col // layout.block_size).clamp(0, blocks.shape[2] - 1)]
    return visible


def _combine(mask, visible, position_bias, dtype):
    """One mask for scaled_dot_product_attention, bool or additive in `dtype`, or None."""
    hidden = torch.finfo(dtype).min  # not -inf: a row that sees nothing would be NaN
    if visible is not None:
        if mask is None:
            mask = visible
        else:
            mask = mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, hidden)
    if position_bias is not None:
        if mask is None:
            mask = position_bias
        else:
            mask = torch.where(mask, position_bias, hidden) if mask.dtype == torch.bool else mask + position_bias
    return mask.to(dtype) if mask is not None and mask.is_floating_point() else mask


def sdpa_attention(
    query, key, value, mask, position_bias, causal, kv_range, packed, layout, dropout, scaling, with_weights=False
):
    """PyTorch's attention under the same rules as the kernels; q, k, v (B, H, S, D).

    mask: None, or 4-D, bool (True: visible) or additive, that holds causality already. Returns (out (B, S, H, D),
    weights (B, H, Sq, Sk) if `with_weights` else None).
    """
    q_length, k_length = query.shape[2], key.shape[2]
    causal = causal and mask is None and q_length > 1
    is_causal = False
    if causal and kv_range is packed is layout is position_bias is None and q_length == k_length and not with_weights:
        causal, is_causal = False, True
    visible = None
    if causal or not (kv_range is packed is layout is None):
        visible = _visible(q_length, k_length, causal, kv_range, packed, layout, query.device)
    mask = _combine(mask, visible, position_bias, query.dtype)
    if with_weights:
        return _weighted(query, key, value, mask, dropout, scaling)
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2), None


def _weighted(query, key, value, mask, dropout, scaling):
    """Attention that keeps its weights, after dropout as in transformers: (out, weights)."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).nan_to_num(0.0).to(query.dtype)  # a row that sees nothing is NaN, and is to be 0
    weights = torch.dropout(weights, dropout, dropout > 0.0)
    return (weights @ value).transpose(1, 2), weights
