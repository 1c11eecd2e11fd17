# SPDX-License-Identifier: Apache-2.0
"""Exact attention in plain PyTorch: what the kernels are held to, and what runs where no compiled library is present.

`attention_reference` is the definition. `reference_forward` and `reference_backward` are the same computation with the
argument list of the ops `attention_fwd` and `attention_bwd`. All three keep the full score matrix of one sequence
in memory: H * Sq * Sk numbers.
"""

import torch

from ._block_layout import listed_blocks

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 8
_LOW_32_BITS = 0xFFFFFFFF


def dropout_threshold(dropout_p):
    """Number of the 256 values of an entry's number that drop it, 0 to 255: the quantised `dropout_p`."""
    return min(max(int(256 * dropout_p + 0.5), 0), 255)


def _philox(counter, key):
    """Philox4x32 (Salmon et al., SC 2011): four words of 32 random bits from a counter of four words and a key of two,
    and behind them what they were two rounds before the end.

    Words are int64 tensors holding 0 <= word < 2**32. A product wraps modulo 2**64, whose upper word an arithmetic
    shift and a mask still recover.
    """
    words = ()
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for done in range(_PHILOX_ROUNDS):
        if done == _PHILOX_ROUNDS - 2:
            words = c0, c1, c2, c3
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW_32_BITS) ^ c1 ^ k0,
            p1 & _LOW_32_BITS,
            ((p0 >> 32) & _LOW_32_BITS) ^ c3 ^ k1,
            p0 & _LOW_32_BITS,
        )
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _LOW_32_BITS, (k1 + _PHILOX_KEY_STEPS[1]) & _LOW_32_BITS
    return c0, c1, c2, c3, *words


def dropout_mask(rng_state, dropout_p, batch, heads, seqlen_q, seqlen_k, *, first_sequence=0):
    """Entries of the attention matrix that dropout keeps: bool (batch, heads, seqlen_q, seqlen_k).

    A function of `rng_state` (int64 (2,): seed, offset) and of the entry's sequence, head, row and column alone.
    One Philox call serves the 32 entries that one lane of a warp holds of a 32 x 32 tile (kernels/attention/dropout.h):
    rows r, r + 8, r + 16, r + 24 of the tile and columns 2c, 2c + 1 of each of its four groups of 8. Each of the 8
    words has one bit of every entry's number, the highest first. `first_sequence` is the number of the first sequence
    of the batch.
    """
    device = rng_state.device

    def axis(size, dim, step=1):
        return (torch.arange(size, device=device) * step).view([-1 if d == dim else 1 for d in range(4)])

    row_tiles, col_tiles = -(-seqlen_q // 32), -(-seqlen_k // 32)
    sequence_head = axis(batch * heads, 0) + first_sequence * heads
    key = rng_state[0] & _LOW_32_BITS, (rng_state[0] >> 32) & _LOW_32_BITS
    drawn = 0  # (batch * heads, row_tiles, col_tiles, 32 lanes, 32 entries)
    lane = axis(col_tiles, 2, 32) + axis(32, 3)
    for word in _philox((lane, axis(row_tiles, 1), sequence_head, rng_state[1] & _LOW_32_BITS), key):
        drawn = 2 * drawn + ((word[..., None] >> torch.arange(32, device=device)) & 1)
    # lane = (row % 8, column pair); entry = byte (row half, column parity), bits from the top (row // 16, column group)
    drawn = drawn.view(batch * heads, row_tiles, col_tiles, 8, 4, 2, 2, 8).flip(-1).unflatten(-1, (2, 4))
    drawn = drawn.permute(0, 1, 7, 5, 3, 2, 8, 4, 6)
    keep = drawn.reshape(batch, heads, row_tiles * 32, col_tiles * 32) >= dropout_threshold(dropout_p)
    return keep[:, :, :seqlen_q, :seqlen_k]


def _visible(seqlen_q, seqlen_k, causal, kv_range, blocks, block_size, device):
    """Which key each query of one sequence sees: bool, broadcasts to (H, Sq, Sk)."""
    row = torch.arange(seqlen_q, device=device)[:, None]
    col = torch.arange(seqlen_k, device=device)
    visible = torch.ones(1, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (col <= row + seqlen_k - seqlen_q)
    if kv_range is not None:
        visible = visible & (kv_range[0] <= col) & (col < kv_range[1])
    if blocks is not None:
        visible = visible & blocks[:, row // block_size, col // block_size]
    return visible


def _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
    """(rows of q, rows of k) of every sequence: an index of the batch, or slices of the packed tokens."""
    if cu_seqlens_q is None:
        return [(b, b) for b in range(q.shape[0])]
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    pairs = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    return [(slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in pairs]


def _probabilities(q, k, b, blocks, causal, kv_range, block_size, rng_state, dropout_p, scale):
    """Scores of sequence `b`, -inf where hidden, and the factor of dropout (a tensor, or 1): both (H, Sq, Sk)."""
    visible = _visible(
        q.shape[0], k.shape[0], causal, None if kv_range is None else kv_range[b], blocks, block_size, q.device
    )
    scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~visible, -torch.inf)
    threshold = dropout_threshold(dropout_p)
    if threshold == 0:
        return scores, 1
    keep = dropout_mask(rng_state, dropout_p, 1, q.shape[1], q.shape[0], k.shape[0], first_sequence=b)[0]
    return scores, keep.to(q.dtype) * (256 / (256 - threshold))


def _forward(q, k, v, kv_range, cu_seqlens_q, cu_seqlens_k, blocks, block_size, rng_state, dropout_p, scale, causal):
    outs, lses = [], []
    for b, (rows, cols) in enumerate(_sequences(q, k, cu_seqlens_q, cu_seqlens_k)):
        scores, dropout = _probabilities(
            q[rows], k[cols], b, blocks, causal, kv_range, block_size, rng_state, dropout_p, scale
        )
        lse = torch.logsumexp(scores, -1)
        p = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])  # a row without keys: all zero
        outs.append(torch.einsum("hqk,khd->qhd", p * dropout, v[cols]))
        lses.append(lse)
    if cu_seqlens_q is None:
        if not outs:  # an empty batch
            return torch.zeros_like(q), q.new_zeros(0, q.shape[2], q.shape[1])
        return torch.stack(outs), torch.stack(lses)
    unowned = q.shape[0] - sum(out.shape[0] for out in outs)  # packed tokens past the last sequence
    out = torch.cat([*outs, q.new_zeros(unowned, *q.shape[1:])])
    return out, torch.cat([*lses, q.new_zeros(q.shape[1], unowned)], -1)


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


def attention_reference(
    q,
    k,
    v,
    *,
    causal=False,
    scale=None,
    dropout_p=0.0,
    rng_state=None,
    kv_range=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    layout=None,
    dtype=torch.float64,
):
    """softmax(scale * q k^T) v, computed in `dtype`, differentiable.

    q (B, Sq, H, D), k and v (B, Sk, H, D); with `cu_seqlens_q`, `cu_seqlens_k` (int32 (N + 1,)) packed (T, H, D).
    Returns `out`, of q's shape, and `lse`, the natural logarithm of the sum of the exponentials of each row,
    (B, H, Sq) or (H, Tq), both of `dtype`. A query with no key gives out 0 and lse -inf. `causal`: query i sees key j
    iff j <= i + Sk - Sq. `kv_range` (B, 2): first and one-past-last valid key. `rng_state`: see `dropout_mask`;
    dropout acts on the normalised probabilities. `layout` (BlockLayout): hides what lies in no listed block.
    """
    scale = _scale(q, scale)
    blocks = None if layout is None else layout.to_dense()
    block_size = 0 if layout is None else layout.block_size
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return _forward(
        q, k, v, kv_range, cu_seqlens_q, cu_seqlens_k, blocks, block_size, rng_state, dropout_p, scale, causal
    )


def _compute_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def tokens_first(t, heads_first):
    """(..., tokens, heads, head_dim) of a tensor that has it, or with `heads_first` (..., heads, tokens, head_dim).

    The other way round it is the same exchange.
    """
    return t.transpose(-3, -2) if heads_first else t


def _blocks_of_lists(row_start, row_index, col_start):
    return None if row_start is None else listed_blocks(row_start, row_index, col_start.shape[1] - 1)


def reference_forward(
    q, k, v, scale, causal, deterministic, heads_first, kv_range=None, dropout_p=0.0, rng_state=None,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0, row_start=None, row_index=None,
    col_start=None, col_index=None, row_items=None, col_items=None, block_size=0,
):  # fmt: skip
    """`attention_fwd`: (out in q's dtype, lse), computed in float32, or in float64 if q is."""
    blocks = _blocks_of_lists(row_start, row_index, col_start)
    wide, scale = _compute_dtype(q), _scale(q, scale)
    out, lse = _forward(
        *(tokens_first(t, heads_first).to(wide) for t in (q, k, v)), kv_range, cu_seqlens_q, cu_seqlens_k, blocks,
        block_size, rng_state, dropout_p, scale, causal,
    )  # fmt: skip
    return out.to(q.dtype).contiguous(), lse.contiguous()


def reference_backward(
    dout, out, lse, q, k, v, scale, causal, deterministic, heads_first, kv_range=None, dropout_p=0.0,
    rng_state=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0, row_start=None,
    row_index=None, col_start=None, col_index=None, row_items=None, col_items=None, block_size=0,
):  # fmt: skip
    """`attention_bwd`: (dq, dk, dv) in the dtypes of q, k, v.

    With p the probabilities and m the factor of dropout: dv = (p m)^T dout, ds = p (m dout v^T - rowsum(dout out)),
    dq = scale ds k, dk = scale ds^T q.
    """
    blocks = _blocks_of_lists(row_start, row_index, col_start)
    wide, scale = _compute_dtype(q), _scale(q, scale)
    dtypes = q.dtype, k.dtype, v.dtype
    q, k, v = (tokens_first(t, heads_first).to(wide) for t in (q, k, v))
    dout, out = dout.to(wide), out.to(wide)
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for b, (rows, cols) in enumerate(_sequences(q, k, cu_seqlens_q, cu_seqlens_k)):
        scores, dropout = _probabilities(
            q[rows], k[cols], b, blocks, causal, kv_range, block_size, rng_state, dropout_p, scale
        )
        row_lse = lse[b] if cu_seqlens_q is None else lse[:, rows]
        p = torch.exp(scores - torch.where(row_lse == -torch.inf, 0, row_lse)[..., None])
        delta = (dout[rows] * out[rows]).sum(-1).T[..., None]
        ds = p * (dropout * torch.einsum("qhd,khd->hqk", dout[rows], v[cols]) - delta) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, k[cols])
        dk[cols] = torch.einsum("hqk,qhd->khd", ds, q[rows])
        dv[cols] = torch.einsum("hqk,qhd->khd", p * dropout, dout[rows])
    return tuple(tokens_first(grad.to(d), heads_first) for grad, d in zip((dq, dk, dv), dtypes, strict=True))
