# SPDX-License-Identifier: Apache-2.0
"""Two approximate attentions to compare with, in plain PyTorch, under the names `linformer` and `performer`.

Linformer (arXiv 2006.04768): learned projections of the keys and of the values to RANK rows each, shared by the heads
of a layer. Performer (arXiv 2009.14794): softmax as an inner product of RANK positive orthogonal random features.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.models.bert.modeling_bert import BertSelfAttention

RANK = 256  # as in the comparisons of Nyströmformer (arXiv 2102.03902)
BASELINES = ("linformer", "performer")


def _visible(mask):
    """(B, 1, K, 1) of a mask of keys, bool (B, 1, Q, K), or None."""
    return None if mask is None else mask[:, :, 0, :, None]


def linformer(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """query, key, value (B, H, S, D). Returns (out (B, S, H, D), None)."""
    visible = _visible(attention_mask)
    if visible is not None:
        key, value = key * visible, value * visible
    weights = module.linformer_projection[:, :, : key.shape[2]]
    # as products of two matrices: a product for each head would sum B x H gradients of the projection
    key, value = (F.linear(t.transpose(2, 3), w).transpose(2, 3) for t, w in zip((key, value), weights, strict=True))
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling).transpose(1, 2), None


def _features(inputs, directions, over):
    """exp of the random projections of `inputs`, less their maximum over the dimensions `over`, which cancels out."""
    powers = (inputs @ directions.T).float() - inputs.float().square().sum(-1, keepdim=True) / 2
    return (powers - powers.detach().amax(over, keepdim=True)).exp() + 1e-6


def performer(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """query, key, value (B, H, S, D). Returns (out (B, S, H, D), None). Without dropout: there are no weights."""
    root = (query.shape[-1] ** -0.5 if scaling is None else scaling) ** 0.5
    query = _features(query * root, module.performer_directions, -1).to(value.dtype)
    key = _features(key * root, module.performer_directions, (-2, -1)).to(value.dtype)
    visible = _visible(attention_mask)
    if visible is not None:
        key = key * visible
    total = query @ key.sum(2)[..., None]
    return (query @ (key.transpose(2, 3) @ value) / total).transpose(1, 2), None


def orthogonal_directions(count, dim):
    """(count, dim): orthogonal in groups of `dim`, each as long as a normal vector."""
    groups = [torch.linalg.qr(torch.randn(dim, dim))[0] for _ in range(-(-count // dim))]
    return torch.cat(groups)[:count] * torch.randn(count, dim).norm(dim=1, keepdim=True)


def add_weights(model, name):
    """Give every layer of a BERT what the attention `name` needs besides BERT's weights."""
    config = model.config
    for layer in model.modules():
        if not isinstance(layer, BertSelfAttention):
            continue
        if name == "linformer":
            shape = 2, RANK, config.max_position_embeddings
            layer.linformer_projection = nn.Parameter(torch.randn(shape) * RANK**-0.5)
        elif name == "performer":
            layer.register_buffer("performer_directions", orthogonal_directions(RANK, layer.attention_head_size))


for _function in (linformer, performer):
    AttentionInterface.register(_function.__name__, _function)
    AttentionMaskInterface.register(_function.__name__, sdpa_mask)
