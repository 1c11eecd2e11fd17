# SPDX-License-Identifier: Apache-2.0
"""Masked-pixel pretraining: which grey levels are under the hidden squares? Images alone, no labels and no curves.

Squares, because a single hidden pixel of a dash can be read off its neighbours; under 4 x 4 pixels a curve has to be
carried on. The levels are told in 16 steps and by cross-entropy: a mean, as of a squared error, would be grey fog.
"""

import torch
from torch import nn
from torch.nn import functional as F

SQUARE = 4  # pixels a side
HIDDEN = 128  # grey level of a hidden pixel
STEP = 16  # grey levels told as one


def hide_pixels(images, share):
    """(images with about `share` of their squares hidden, target uint8 (B, S, S): 0 where nothing is asked, else 1 +
    the step of the grey level). images uint8 (B, S, S), S a multiple of 4; drawn from torch's CPU generator."""
    squares = torch.rand(len(images), *(side // SQUARE for side in images.shape[1:])) < share
    hidden = squares.repeat_interleave(SQUARE, 1).repeat_interleave(SQUARE, 2).to(images.device, non_blocking=True)
    return images.masked_fill(hidden, HIDDEN), torch.where(hidden, images // STEP + 1, 0)


class PixelReader(nn.Module):
    """A classifier's encoder and, in pretraining only, a linear head that reads the hidden levels from its last layer.
    Takes the place of a PathTracer; neither the head nor anything of the classifier's own head is trained into it."""

    reads = "pixel"
    curve_layers = ()

    def __init__(self, model, background_weight=0.05):
        super().__init__()
        self.model = model
        self.background_weight = background_weight
        self.level_head = nn.Linear(model.config.hidden_size, 256 // STEP)
        for unused in (model.classifier, model.base_model.pooler):
            unused.requires_grad_(False)  # several processes would wait for their gradients

    def forward(self, input_ids, target, labels):
        """input_ids int64 (B, G + P), target uint8 (B, P) of `hide_pixels` in token order; labels are not looked at.

        Returns fp32 (loss, 0, stats (3,) = accuracy at hidden pixels that are not background, 0, 0)."""
        first = input_ids.shape[1] - target.shape[1]
        hidden = self.model.base_model(input_ids=input_ids).last_hidden_state
        guess = self.level_head(hidden[:, first:]).float()
        lit = (target > 1).float()
        weight = torch.where(target == 1, self.background_weight, lit)
        loss = F.cross_entropy(guess.flatten(0, 1), (target.long() - 1).clamp(min=0).flatten(), reduction="none")
        loss = (loss * weight.flatten()).sum() / weight.sum().clamp(min=1)
        accuracy = ((guess.argmax(-1) == target.long() - 1) * lit).sum() / lit.sum().clamp(min=1)
        none = torch.zeros_like(accuracy)
        return loss, none, torch.stack((accuracy, none, none))
