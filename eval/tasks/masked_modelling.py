# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling (BERT, arXiv 1810.04805) on pieces of documents, packed without padding.

Of the tokens, a share is chosen; 80% of these become [MASK], 10% a random token, 10% stay. The head runs on the chosen
tokens alone, and a document longer than the model's input is cut into pieces that follow each other.
"""

import torch
from tasks.documents import with_special_tokens
from tasks.token_batches import group_by_length, pack, step_indices, to_device
from tasks.training_loop import bar_interval
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm


class MaskedLoss(nn.Module):
    """The model with its loss, as `TextTrainer` takes it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def logits(self, places, **inputs):
        """fp32 (chosen tokens, vocabulary) of a packed batch."""
        hidden = self.model.base_model(**inputs).last_hidden_state[0]
        return self.model.cls(hidden[places]).float()

    def forward(self, places, targets, share, **inputs):
        """The sum of the chosen tokens' losses, times `share`. places, targets int64 (chosen tokens,)."""
        return F.cross_entropy(self.logits(places, **inputs), targets, reduction="sum") * share


def cut(documents, tokenizer, max_length):
    """[CLS] piece [SEP] of all of every document, int32 arrays of at most `max_length` tokens."""
    room = max_length - 2
    return [
        with_special_tokens(tokens[start : start + room], tokenizer, max_length)
        for tokens in documents
        for start in range(0, len(tokens), room)
    ]


class MaskedBatches:
    """Micro-batches of pieces, int32 arrays. The draws come from torch's generator, or from the one that is given."""

    def __init__(self, pieces, tokenizer, mlm_probability, batch_size, max_batch_tokens, seed):
        self.pieces, self.mlm_probability = pieces, mlm_probability
        self.batch_size, self.max_batch_tokens, self.seed = batch_size, max_batch_tokens, seed
        self.mask, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        self.special = torch.tensor(sorted(tokenizer.all_special_ids))

    def groups(self, places):
        """`places` in lists that fit the budget of tokens."""
        groups = group_by_length([len(self.pieces[place]) for place in places], self.max_batch_tokens, unpad=True)
        return [[places[i] for i in group] for group in groups]

    def collate(self, places, generator=None):
        """Model inputs of the pieces at `places`, with places and targets of the chosen tokens."""
        batch = pack([self.pieces[place] for place in places])
        ids = batch["input_ids"][0]
        draw, fate = torch.rand(2, len(ids), generator=generator)
        chosen = (draw < self.mlm_probability) & ~torch.isin(ids, self.special)
        targets = ids[chosen]
        random = torch.randint(self.vocab_size, (len(ids),), generator=generator)
        ids = torch.where(chosen & (fate < 0.9), torch.where(fate < 0.8, self.mask, random), ids)
        return {**batch, "input_ids": ids[None], "places": chosen.nonzero()[:, 0], "targets": targets}

    def __call__(self, step, rank, world):
        """What `TextTrainer` asks for. batch_size pieces for each process."""
        places = step_indices(len(self.pieces), step, self.batch_size * world, self.seed)
        places = sorted(places, key=lambda place: -len(self.pieces[place]))[rank::world]
        batches = [self.collate(group) for group in self.groups(places)]
        share = 1 / max(1, sum(len(batch["targets"]) for batch in batches))
        return [{**batch, "share": share, "num_tokens": batch["input_ids"].numel()} for batch in batches]


@torch.no_grad()
def score_masked(module, batches, accelerator):
    """float64 (pieces, 3) on every process: summed loss, right guesses and number of chosen tokens, always the same
    tokens."""
    module.eval()
    sums = torch.zeros(len(batches.pieces), 3, dtype=torch.float64, device=accelerator.device)
    groups = batches.groups(list(range(len(batches.pieces))))
    mine = list(enumerate(groups))[accelerator.process_index :: accelerator.num_processes]
    show = accelerator.is_main_process
    for number, group in tqdm(mine, desc="score masked tokens", disable=not show, mininterval=bar_interval()):
        batch = batches.collate(group, torch.Generator().manual_seed(number))
        offsets = batch["cu_seq_lens_q"][1:].long()
        piece = torch.tensor(group)[torch.bucketize(batch["places"], offsets, right=True)].to(accelerator.device)
        batch = to_device(batch, accelerator.device)
        targets = batch.pop("targets")
        with accelerator.autocast():
            logits = module.logits(**batch)
        loss = F.cross_entropy(logits, targets, reduction="none")
        right = logits.argmax(-1) == targets
        sums.index_add_(0, piece, torch.stack((loss, right, torch.ones_like(loss)), 1).double())
    return accelerator.reduce(sums, "sum").cpu().numpy()
