# SPDX-License-Identifier: Apache-2.0
"""What bench_training.py times: models of random weights, batches of random tokens, and who trains them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from flash_models import layouts, patch
from flash_models.models.hooks import packed_arguments

MODELS = {  # name: (hidden size, layers, heads)
    "bert-large": (1024, 24, 16),
    "bert-base": (768, 12, 12),
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "bert-mini": (256, 4, 4),
    "gpt2-mini": (256, 4, 4),
}


class Variant(NamedTuple):
    attention: str | None = None  # of transformers; None for ours
    compiled: bool = False
    sparse: bool = False

    @property
    def ours(self):
        return self.attention is None


VARIANTS = {
    "eager": Variant("eager"),
    "sdpa": Variant("sdpa"),
    "sdpa_compile": Variant("sdpa", compiled=True),
    "flash_models": Variant(),
    "flash_models_compile": Variant(compiled=True),
    "flash_models_sparse": Variant(sparse=True),
    "flash_models_sparse_compile": Variant(compiled=True, sparse=True),
}
# Longformer's window (arXiv 2004.05150), and one block of global tokens
BLOCK_SPARSE = {"pattern": "local_global", "window": 256, "global": 128}
MASKED = 0.15  # of BERT's tokens
PEAK_FLOPS = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12}  # dense bfloat16, as NVIDIA publishes them


@dataclass(frozen=True)
class Case:
    model: str
    batch: int  # sequences of one process
    length: int
    padded: bool  # lengths uniform in length / 4 .. length, filled up on the right

    @property
    def is_bert(self):
        return self.model.startswith("bert")

    def config(self, attention, dropout=True):
        """At transformers' defaults, with as many positions as the case needs."""
        hidden, layers, heads = MODELS[self.model]
        common = {"attn_implementation": attention, "use_cache": False}
        if self.is_bert:
            rates = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            return BertConfig(
                hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=4 * hidden, max_position_embeddings=self.length, **rates, **common,
            )  # fmt: skip
        rates = {} if dropout else {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        return GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, n_positions=self.length, **rates, **common)

    def build(self, variant, device, dropout=True, seed=0):
        """The model in training mode, not compiled yet."""
        kind = VARIANTS[variant]
        torch.manual_seed(seed)
        with torch.device(device):
            config = self.config(kind.attention or "sdpa", dropout)
            model = BertForMaskedLM(config) if self.is_bert else GPT2LMHeadModel(config)
        model.loss_type = "ForMaskedLM" if self.is_bert else "ForCausalLM"  # GPT-2's default, without a graph break
        if kind.ours:
            unpad = self.is_bert and self.padded and not kind.compiled  # it cannot look at a mask: see `feed`
            patch(model, BLOCK_SPARSE if kind.sparse else None, unpad=unpad, fuse=True)
        return model.train()

    def batches(self, count, device, seed=0):
        """`count` batches: input_ids, labels and, where padded, attention_mask."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary, made = self.config("sdpa").vocab_size, []
        for _ in range(count):
            shape = self.batch, self.length
            ids = torch.randint(1000, vocabulary, shape, generator=generator)
            labels = ids.clone()
            if self.is_bert:
                labels[torch.rand(shape, generator=generator) >= MASKED] = -100
            batch = {"input_ids": ids, "labels": labels}
            if self.padded:
                lengths = torch.randint(self.length // 4, self.length + 1, (self.batch, 1), generator=generator)
                mask = torch.arange(self.length) < lengths
                batch["attention_mask"] = mask.long()
                ids[~mask] = 0
                labels[~mask] = -100
            made.append({key: value.to(device) for key, value in batch.items()})
        return made

    def packs(self, variant):
        """Whether `variant` gets its batches packed: ours compiled, for padded BERT batches."""
        return VARIANTS[variant].ours and VARIANTS[variant].compiled and self.is_bert and self.padded

    def feed(self, variant, batch):
        """What `variant` is given for a batch of `batches`: the batch itself, or the same tokens without the padding.

        Packed, input_ids, labels and position_ids are (1, T), and the int32 offsets (batch + 1,) say where sequences
        end. T differs from batch to batch; one graph takes them all, because T is marked as dynamic and the longest
        length is the case's, not the batch's.
        """
        if not self.packs(variant):
            return batch
        mask = batch["attention_mask"].bool()
        positions = torch.arange(self.length, device=mask.device).expand_as(mask)
        rows = {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": positions}
        rows = {name: row[mask][None] for name, row in rows.items()}
        for row in rows.values():
            torch._dynamo.mark_dynamic(row, 1)
        ends = packed_arguments(mask.sum(1).cpu(), mask.device)
        return {**rows, **ends, "max_length_q": self.length, "max_length_k": self.length}

    def with_block_mask(self, batch):
        """The batch with a mask by which transformers sees what our block-sparse variant does, bool (B, 1, S, S)."""
        mask = layouts.from_config(BLOCK_SPARSE, self.length, self.length, batch["input_ids"].device).token_mask()[0]
        mask = (mask if self.is_bert else mask.tril()).expand(self.batch, 1, -1, -1)
        if self.padded:
            mask = mask & batch["attention_mask"].bool()[:, None, None]
        return {**batch, "attention_mask": mask}

    def flop(self, batch):
        """Of forward and backward on the tokens that are not padding, and on BERT's vocabulary where there is a label:
        6 for each weight and token, and 12 S^2 N a layer for attention, halved when causal."""
        hidden, layers, _ = MODELS[self.model]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        lengths = mask.sum(1).double()
        projected = (batch["labels"] != -100).sum().item()
        weights = 6 * 12 * hidden**2 * layers * lengths.sum().item()
        attention = 12 * hidden * layers * lengths.square().sum().item() * (1 if self.is_bert else 0.5)
        head = 6 * projected * hidden * self.config("sdpa").vocab_size
        return weights + attention + head + (6 * projected * hidden**2 if self.is_bert else 0)

    def tokens(self, batch):
        return int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())


def peak_flops(name):
    """Of a GPU by its name; None where it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
