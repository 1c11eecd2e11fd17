# SPDX-License-Identifier: Apache-2.0
"""The classifier of Path-X and Path-256, its training losses, and the augmentation, all on the device."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from flash_models import FlashBertConfig, FlashBertForSequenceClassification, images_to_input_ids
from flash_models.layouts import tile_order

NUM_GLOBAL = 64
# 1.6 M parameters; one token a pixel, 5 x 5 neighbouring tiles of 8 x 8 pixels, 64 tokens that see and are seen by all.
DEFAULT_CONFIG = {
    "vocab_size": 256 + NUM_GLOBAL,
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "initializer_range": 0.05,  # gives queries and keys the scale that 0.02 gives them at BERT-base's width
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_global_tokens": NUM_GLOBAL,
    "image_block_size": 64,
    "position_embedding_type": "rotary_2d",
    "rotary_max_wavelength": 256.0,
    "block_sparse": {"pattern": "grid_2d", "radius": 2, "global": NUM_GLOBAL, "block_size": 64},
    "id2label": {0: "disconnected", 1: "connected"},
    "label2id": {"disconnected": 0, "connected": 1},
}


def create_model(size, config_name=None):
    """New classifier for size x size images, from a config JSON or DEFAULT_CONFIG.

    The embeddings of the 256 grey levels start on a line (near levels near each other): independent ones would have
    to learn from rare levels that 200 and 201 look alike.
    """
    values = json.loads(Path(config_name).read_text()) if config_name else dict(DEFAULT_CONFIG)
    values.pop("model_type", None)
    values.setdefault("max_position_embeddings", values.get("num_global_tokens", 0) + size * size)
    config = FlashBertConfig(**values)
    model = FlashBertForSequenceClassification(config)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        dark, bright = torch.randn(2, table.shape[1]) * config.initializer_range
        grey = torch.linspace(0, 1, 256)[:, None]
        table[:256] = (1 - grey) * dark + grey * bright + 0.1 * table[:256]
    return model


def load_model(name, trust_remote_code=False):
    """Sequence classifier from a folder or Hub id."""
    return AutoModelForSequenceClassification.from_pretrained(
        name, dtype=torch.float32, trust_remote_code=trust_remote_code
    )


def compile_layers(model):
    """torch.compile one encoder layer and use the result for all: an eighth of the time of compiling the model."""
    for layer in model.base_model.encoder.layer:
        layer.forward = torch.compile(layer.forward, dynamic=False)


def check_fits(config, size):
    """Raises ValueError where a model of this config cannot read size x size images."""
    side = {64: 8, 128: 16}.get(getattr(config, "image_block_size", 64), 8)
    num_global = getattr(config, "num_global_tokens", 0)
    if config.vocab_size < 256 + num_global:
        raise ValueError(
            f"vocab_size is {config.vocab_size}, but 256 grey levels and {num_global} global tokens need "
            f"{256 + num_global}; this is no image checkpoint, take one such as model_cards/pathx-16k-flash"
        )
    if config.num_labels != 2:
        raise ValueError(f"the model has {config.num_labels} labels; Pathfinder has 2 (0 disconnected, 1 connected)")
    if size % side:
        raise ValueError(f"image size {size} is not a multiple of the {side}-pixel tile; choose another size")
    tokens = num_global + size * size
    absolute = getattr(config, "position_embedding_type", "absolute") == "absolute"  # rotary positions have no end
    if absolute and tokens > config.max_position_embeddings:
        raise ValueError(
            f"{size} x {size} images are {tokens} tokens, but the model's max_position_embeddings is "
            f"{config.max_position_embeddings}; evaluate smaller images or take a checkpoint made for these"
        )
    height = (getattr(config, "block_sparse", None) or {}).get("height", size)
    if height != size:
        raise ValueError(f"the model's block_sparse pattern is for images {height} pixels high, these are {size}")


class PathTracer(nn.Module):
    """Classifier and, in training only, a linear head per chosen layer that reads two facts for each pixel:
    "my curve carries a marker" and "my curve carries both". This is flood-fill supervision; the heads are not saved
    with the checkpoint."""

    reads = "label"

    def __init__(self, model, curve_layers, background_weight=0.05):
        super().__init__()
        self.model = model
        self.curve_layers = curve_layers
        self.background_weight = background_weight
        self.curve_heads = nn.ModuleList(nn.Linear(model.config.hidden_size, 2) for _ in curve_layers)
        self.hidden_states = []
        # Hooks of its own: those behind output_hidden_states reach into the layers, where they cannot be compiled.
        for layer in curve_layers:
            model.base_model.encoder.layer[layer - 1].register_forward_hook(self._keep)

    def _keep(self, layer, arguments, output):
        self.hidden_states.append(output)

    def forward(self, input_ids, trace, labels):
        """input_ids int64 (B, G + P), trace uint8 (B, P) in token order (see `prepare_batch`), labels int64 (B,).

        Returns fp32 (label_loss, curve_loss, stats (3,) = label accuracy, curve intersection, curve union)."""
        logits = self.model(input_ids=input_ids).logits.float()
        hidden_states, self.hidden_states = self.hidden_states, []
        label_loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        curve_loss = both = either = logits.new_zeros(())
        if self.curve_layers:
            first = input_ids.shape[1] - trace.shape[1]
            target = torch.stack((trace >= 2, trace == 3), dim=-1).float()
            weight = torch.where(trace > 0, 1.0, self.background_weight)[..., None]
            losses = []
            for hidden, head in zip(hidden_states, self.curve_heads, strict=True):
                guess = head(hidden[:, first:]).float()
                loss = F.binary_cross_entropy_with_logits(guess, target, reduction="none")
                losses.append((loss * weight).sum() / (2 * weight.sum()))
            curve_loss = torch.stack(losses).mean()
            lit, truth = (guess[..., 0] > 0) & (trace > 0), trace >= 2
            both, either = (lit & truth).sum().float(), (lit | truth).sum().float()
        return label_loss, curve_loss, torch.stack((accuracy, both, either))


def augment(images, trace, jitter):
    """One of the 8 symmetries of the square per image, and a contrast factor in [1 - jitter, 1 + jitter].

    images, trace uint8 (B, S, S). The draws come from torch's CPU generator: same on every device, no host sync.
    """
    flip_y, flip_x, swap = (torch.rand(3, len(images)) < 0.5).to(images.device, non_blocking=True)[:, :, None, None]

    def turn(maps):
        maps = torch.where(flip_y, maps.flip(1), maps)
        maps = torch.where(flip_x, maps.flip(2), maps)
        return torch.where(swap, maps.transpose(1, 2), maps)

    if jitter:
        gain = 1 + jitter * (2 * torch.rand(len(images), 1, 1) - 1)
        images = (images * gain.to(images.device, non_blocking=True)).round_().clamp_(max=255).to(torch.uint8)
    return turn(images), turn(trace)


def prepare_batch(images, trace, config):
    """Tokens of uint8 (B, S, S) images and their trace: (input_ids (B, G + S*S), trace (B, S*S) in tile order)."""
    size = images.shape[-1]
    order = tile_order(size, size, config.image_block_size, images.device)
    return images_to_input_ids(images, config), trace.flatten(1)[:, order]


def trace_map(curve_ids, marked):
    """What the curve heads learn, uint8 (B, S, S): 0 background, 1 curve without a marker, 2 with one, 3 with both.

    curve_ids uint8 (B, S, S), 0 = background; marked int (B, 2): the curve of each of the two markers."""
    marked = marked[..., None, None]
    carries = (curve_ids == marked[:, 0]) | (curve_ids == marked[:, 1])
    carries_both = carries & (marked[:, 0] == marked[:, 1])
    return (curve_ids > 0).astype(np.uint8) + carries + carries_both
