# SPDX-License-Identifier: Apache-2.0
"""Batches of token sequences of many lengths under a budget of tokens: padded, or packed without padding.

A step of the optimizer has a fixed number of sequences, whatever the budget: they are sorted by length and cut into
micro-batches whose gradients add up. So the budget changes memory and speed but not what is learned, and batches are
as random as the order of the documents.
"""

import functools
import itertools

import numpy as np
import torch


@functools.lru_cache(maxsize=4)
def _order(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


def step_indices(count, step, size, seed):
    """The `size` indices of step number `step` in an endless row of shuffled epochs over `count` items."""
    places = np.arange(step * size, (step + 1) * size)
    return [int(_order(count, seed, int(place) // count)[place % count]) for place in places]


def group_by_length(lengths, max_tokens, unpad):
    """Lists of positions in `lengths`, longest first, each list within `max_tokens` tokens, padding included.

    A sequence that is longer than that is a list of its own."""
    groups, tokens = [], 0
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        # padded, every sequence costs as much as the first of its group, which is the longest
        cost = lengths[place] if unpad or not groups else lengths[groups[-1][0]]
        if groups and tokens + cost <= max_tokens:
            groups[-1].append(place)
            tokens += cost
        else:
            groups.append([place])
            tokens = lengths[place]
    return groups


def pad(sequences, pad_id):
    """Model inputs (B, S) of int arrays, filled up on the right with `pad_id`."""
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.as_tensor(np.asarray(sequence, np.int64))
        mask[row, : len(sequence)] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def pack(sequences):
    """Model inputs (1, T) that hold the sequences one behind the other, told apart by cu_seq_lens (N + 1,)."""
    lengths = [len(sequence) for sequence in sequences]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.from_numpy(np.concatenate(sequences).astype(np.int64))[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def to_device(batch, device):
    """The batch with its tensors on `device`. From pinned memory, so that the CPU does not wait for a GPU."""
    pinned = {k: v.pin_memory() if device.type == "cuda" and torch.is_tensor(v) else v for k, v in batch.items()}
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in pinned.items()}
