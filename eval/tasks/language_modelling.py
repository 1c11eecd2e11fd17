# SPDX-License-Identifier: Apache-2.0
"""Causal language modelling at several context lengths: the same training tokens, the same scored tokens for each.

Training text is one row of tokens, documents parted by the end-of-text token. A step takes the same blocks of it at
every context length and cuts them into rows of that length, so what differs is only how far back a token may look. The
first steps may cut into rows of the shortest length whatever the context: a new model learns faster from these.
Evaluation slides a window over each held-out document: every token is scored once, with at least (context length -
stride) tokens before it where the document has so many.
"""

import math

import numpy as np
import torch
from tasks.token_batches import step_indices, to_device
from tasks.training_loop import bar_interval
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

STRETCH = 16_384  # scored tokens that are drawn together in the bootstrap: neighbouring tokens are not independent


class CausalLoss(nn.Module):
    """The model with its loss, as `TextTrainer` takes it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, targets, share):
        """input_ids, targets int64 (B, L): the sum of the tokens' losses, times `share`."""
        logits = self.model(input_ids=input_ids, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") * share


class TokenBlocks:
    """Micro-batches of one row of tokens, int32 (n,). `block` tokens are cut into rows of `context` of them, in the
    first `short_steps` steps of `short`; each epoch begins at another place of the text, so that the cuts move."""

    def __init__(self, tokens, block, context, tokens_per_step, max_batch_tokens, seed, short=None, short_steps=0):
        for length in (context, short or context):
            if block % length:
                raise ValueError(f"{length} tokens of context do not divide the longest, {block}; use powers of two")
        self.tokens, self.block, self.context, self.seed = tokens, block, context, seed
        self.short, self.short_steps = short, short_steps
        self.blocks_per_step = tokens_per_step // block
        self.max_batch_tokens = max_batch_tokens
        # one block less, so that there is room to move, and one token less, because the last has no successor
        self.count = (len(tokens) - 1) // block - 1
        if self.count < 1:
            raise ValueError(
                f"the training text has {len(tokens):,} tokens; blocks of {block:,} need at least {2 * block + 1:,}: "
                "give more text or a shorter --max_length"
            )

    def __call__(self, step, rank, world):
        """What `TextTrainer` asks for: this process's share of the step's blocks."""
        indices = step_indices(self.count, step, self.blocks_per_step, self.seed)
        if len(indices) % world:
            raise ValueError(f"{len(indices)} blocks a step do not divide among {world} processes")
        rows, length = [], self.short if step < self.short_steps else self.context
        for number in range(rank, len(indices), world):
            epoch = (step * self.blocks_per_step + number) // self.count
            shift = int(np.random.default_rng((self.seed, epoch, 1)).integers(self.block))
            start = shift + indices[number] * self.block
            rows += [self.tokens[at : at + length + 1] for at in range(start, start + self.block, length)]
        rows = torch.from_numpy(np.stack(rows).astype(np.int64))
        share = 1 / (len(rows) * length)
        return [
            {"input_ids": part[:, :-1], "targets": part[:, 1:], "share": share, "num_tokens": len(part) * length}
            for part in rows.split(max(1, self.max_batch_tokens // length))
        ]


def windows(length, context, stride):
    """[(start, first, end)] over a document of `length` tokens behind one end-of-text token: the inputs are places
    start .. end - 1, and the tokens at places first + 1 .. end are scored, so that each of 1 .. length is once."""
    found = []
    for first in range(0, length, stride):
        end = min(first + stride, length)
        found.append((max(0, end - context), first, end))
    return found


@torch.no_grad()
def score_tokens(model, documents, context, stride, max_batch_tokens, accelerator, end_of_text):
    """(nll, tokens), float64 (units,) each, on every process: the summed negative log-likelihood and the number of
    tokens of each stretch of STRETCH tokens of each document. documents: int32 arrays."""
    model.eval()
    units, jobs = [0], {}  # jobs by length of the window: those of one length share a batch
    for number, tokens in enumerate(documents):
        for start, first, end in windows(len(tokens), context, stride):
            jobs.setdefault(end - start, []).append((number, start, first, end))
        units.append(units[-1] + -(-len(tokens) // STRETCH))
    sums = torch.zeros(2, units[-1], dtype=torch.float64, device=accelerator.device)
    texts = [torch.from_numpy(np.concatenate(([end_of_text], tokens)).astype(np.int64)) for tokens in documents]
    batches = [
        found[at : at + max(1, max_batch_tokens // length)]
        for length, found in jobs.items()
        for at in range(0, len(found), max(1, max_batch_tokens // length))
    ]
    show = accelerator.is_main_process
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    for batch in tqdm(mine, desc=f"score at {context}", disable=not show, mininterval=bar_interval()):
        numbers, starts, firsts, ends = zip(*batch, strict=True)
        kept = min(stride, ends[0] - starts[0])
        rows = torch.stack([texts[n][start : end + 1] for n, start, end in zip(numbers, starts, ends, strict=True)])
        place = torch.tensor(ends)[:, None] + torch.arange(-kept, 0)  # of the last `kept` tokens, from 0
        fresh = place >= torch.tensor(firsts)[:, None]
        unit = place // STRETCH + torch.tensor([units[number] for number in numbers])[:, None]
        data = to_device({"rows": rows, "fresh": fresh.flatten(), "unit": unit.flatten()}, accelerator.device)
        with accelerator.autocast():
            logits = model(input_ids=data["rows"][:, :-1], use_cache=False, logits_to_keep=kept).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), data["rows"][:, -kept:].flatten(), reduction="none")
        both = torch.stack((loss.double(), torch.ones_like(loss, dtype=torch.float64))) * data["fresh"]
        sums.index_add_(1, data["unit"], both)
    nll, tokens = accelerator.reduce(sums, "sum").cpu().numpy()
    return nll, tokens


def perplexity(nll, tokens):
    """exp of the mean negative log-likelihood, elementwise."""
    return np.exp(np.asarray(nll) / tokens)


def bits_per_byte(nll, num_bytes):
    """What a model needs for a byte of the text, whatever its tokens are."""
    return float(np.sum(nll) / math.log(2) / num_bytes)
