# SPDX-License-Identifier: Apache-2.0
"""Attention and its gradients in plain PyTorch, some queries at a time: what is exact where S x S does not fit."""

import torch

ROWS = 4096  # queries at a time


def attention_and_gradients(q, k, v, dout, layout, dtype):
    """(out, dq, dk, dv) of one sequence and head over the layout's blocks, computed in `dtype`.

    q, k, v, dout: (1, S, 1, D). layout: a BlockLayout that all heads share. Softmax and sums over the pieces are in
    float32 or wider.
    """
    q, k, v, dout = (t[0, :, 0].to(dtype) for t in (q, k, v, dout))
    wide = torch.promote_types(dtype, torch.float32)
    scale, size = q.shape[-1] ** -0.5, layout.block_size
    blocks = layout.to_dense()[0]
    dk, dv = (torch.zeros_like(t, dtype=wide) for t in (k, v))
    outs, dqs = [], []
    for begin in range(0, len(q), ROWS):
        rows = slice(begin, begin + ROWS)
        seen = blocks[begin // size : -(-(begin + ROWS) // size)].repeat_interleave(size, 0).repeat_interleave(size, 1)
        scores = (q[rows] @ k.T * scale).masked_fill_(~seen[: len(q[rows]), : len(k)], -torch.inf)
        p = scores.softmax(-1, dtype=wide).nan_to_num_(0).to(dtype)  # no block: 0
        del scores, seen
        outs.append(p @ v)
        delta = (outs[-1].to(wide) * dout[rows].to(wide)).sum(-1, keepdim=True)
        ds = (p.to(wide) * ((dout[rows] @ v.T).to(wide) - delta)).to(dtype)
        dqs.append(ds @ k * scale)
        dk += ds.T @ q[rows] * scale
        dv += p.T @ dout[rows]
    return [t[None, :, None] for t in (torch.cat(outs), torch.cat(dqs), dk.to(dtype), dv.to(dtype))]
