# SPDX-License-Identifier: Apache-2.0
"""Batches for masked language modelling without padding."""

from dataclasses import dataclass
from itertools import chain

import torch
from transformers import DataCollatorForLanguageModeling

from .hooks import packed_arguments


@dataclass
class DataCollatorForPackedMaskedLM(DataCollatorForLanguageModeling):
    """Hugging Face's collator for masked language modelling, with the examples behind each other instead of padded.

    Takes tokenized examples, with special tokens, and the options of `DataCollatorForLanguageModeling`. A batch holds
    input_ids, labels (-100 where nothing is to be guessed) and position_ids, int64 (1, T), token_type_ids where the
    examples have them, and cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: a BERT on this library's kernels
    then gives every example what it gives it alone. In transformers, DataCollatorWithFlattening does this for causal
    models, and drops the label of every example's first token.

    A model under torch.compile takes such batches as well, and is not compiled for every length: first for the sizes of
    one batch, then for any number of tokens, of examples and longest length, from when each of the three first changes.
    """

    def __post_init__(self):
        super().__post_init__()
        if not self.mlm or self.pad_to_multiple_of is not None:
            raise ValueError(
                f"got mlm={self.mlm}, pad_to_multiple_of={self.pad_to_multiple_of}; packed masked language modelling "
                "has mlm=True and no padding. For causal models use transformers.DataCollatorWithFlattening"
            )

    def torch_call(self, examples):
        """One batch of `examples`, dicts with input_ids."""
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        examples = [dict(example) for example in examples]
        for example in examples:
            example.pop("attention_mask", None)
            if "special_tokens_mask" not in example:
                ids = list(map(int, example["input_ids"]))
                special = self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
                example["special_tokens_mask"] = special
        whole = {name: list(chain.from_iterable(example[name] for example in examples)) for name in examples[0]}
        batch = super().torch_call([whole])
        batch.pop("attention_mask", None)  # the tokenizer adds one when it pads
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
        return {**batch, "position_ids": positions, **packed_arguments(lengths, positions.device)}
