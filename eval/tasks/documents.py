# SPDX-License-Identifier: Apache-2.0
"""Documents with labels: read, tokenised once for all lengths, and handed out in micro-batches."""

import dataclasses

import numpy as np
import torch
from tasks.text_files import TEXT_COLUMNS, Rows, choose_column, read_dataset, read_rows, texts_of
from tasks.token_batches import group_by_length, pack, pad, step_indices
from tqdm.auto import tqdm

LABEL_COLUMNS = ("label", "labels", "violated", "articles")
TOKENIZED_AT_ONCE = 64


@dataclasses.dataclass
class Documents:
    """labels: for each document a list of names, of one name where `multi_label` is False; tokens: int32 arrays
    without special tokens, filled by `tokenize`; problems: what was left out of the source, and why."""

    source: str
    texts: list
    labels: list
    multi_label: bool
    problems: list
    tokens: list = dataclasses.field(default_factory=list)

    def __len__(self):
        return len(self.texts)

    @property
    def num_empty(self):
        return sum(not text.strip() for text in self.texts)

    def select(self, places):
        """Another set, of the documents at `places`."""
        parts = [[column[place] for place in places] for column in (self.texts, self.labels)]
        tokens = [self.tokens[place] for place in places] if self.tokens else []
        return Documents(self.source, *parts, self.multi_label, self.problems, tokens)

    def split(self, share):
        """(the rest, `share` of the documents but at least one), each with its part of every combination of labels, and
        the same whatever the training's seed."""
        order = sorted(np.random.default_rng(0).permutation(len(self)), key=lambda place: sorted(self.labels[place]))
        count = max(1, round(share * len(self)))
        if count >= len(self):
            raise ValueError(f"{self.source} has {len(self)} documents: too few to hold {share:.0%} of them out")
        held = {order[int((number + 0.5) * len(self) / count)] for number in range(count)}
        return self.select(sorted(set(order) - held)), self.select(sorted(held))


def _label_names(value):
    """(names, is multi-label) of a row's label, or None where it is neither a name, a number nor a list of such."""
    if isinstance(value, list):
        return ([str(item) for item in value], True) if all(isinstance(v, (str, int)) for v in value) else None
    if isinstance(value, (str, int)) and str(value).strip():
        return [str(value)], False
    return None


def from_rows(rows, source, text_column=None, label_column=None):
    """Documents of Rows. A list of labels (also an empty one) makes the set multi-label, a single name single-label.

    Raises ValueError where the columns are not there, not one row has both, or the two kinds of labels are mixed."""
    text_column = choose_column(rows, text_column, TEXT_COLUMNS, "text", "--text_column")
    label_column = choose_column(rows, label_column, LABEL_COLUMNS, "labels", "--label_column")
    labels, labelled = {}, Rows(problems=rows.problems)
    for place, row in rows:
        names = _label_names(row.get(label_column))
        if names is None:
            labelled.skip(place, f"column {label_column!r} holds {row.get(label_column)!r}; expected a label or labels")
        else:
            labelled.append((place, row))
            labels[place] = names
    pairs = texts_of(labelled, text_column)
    if not pairs:
        raise ValueError(f"{source} has no document with text and label. The first problem: {labelled.problems[0]}")
    kinds = {labels[place][1] for place, _ in pairs}
    if len(kinds) == 2:
        lists = next(place for place, _ in pairs if labels[place][1])
        single = next(place for place, _ in pairs if not labels[place][1])
        raise ValueError(f"{lists} has a list of labels and {single} a single one; write lists throughout, or nowhere")
    names = [labels[place][0] for place, _ in pairs]
    return Documents(source, [text for _, text in pairs], names, kinds.pop(), labelled.problems)


def read_documents(path, text_column=None, label_column=None):
    """Documents of a JSON-lines, JSON or CSV file."""
    return from_rows(read_rows(path), str(path).rsplit("/", 1)[-1], text_column, label_column)


def load_documents(name, config, split, text_column=None, label_column=None):
    """Documents of a split of a Hub dataset; None where it has no such split."""
    rows = read_dataset(name, config, split)
    return None if rows is None else from_rows(rows, f"{config or name}, {split}", text_column, label_column)


def label_set(documents):
    """Sorted names of the labels. Raises ValueError where nothing can be learned from them."""
    names = sorted({name for names in documents.labels for name in names}, key=lambda name: (len(name), name))
    if documents.multi_label and not names:
        raise ValueError(f"{documents.source} has no label at all; a classifier needs documents that carry some")
    if not documents.multi_label and len(names) < 2:
        raise ValueError(
            f"all {len(documents)} documents of {documents.source} have the one label {names[0]!r}; "
            "a classifier needs two classes"
        )
    return names


def label_matrix(documents, names):
    """bool (documents, labels), and how often each label outside of `names` occurs."""
    column = {name: place for place, name in enumerate(names)}
    matrix, unknown = np.zeros((len(documents), len(names)), bool), {}
    for row, labels in enumerate(documents.labels):
        for label in set(labels):
            if label in column:
                matrix[row, column[label]] = True
            else:
                unknown[label] = unknown.get(label, 0) + 1
    return matrix, unknown


def tokenize(texts, tokenizer, max_tokens, show=False):
    """int32 arrays of at most `max_tokens` token ids (None: of all), without special tokens."""
    found = []
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    options |= {"truncation": max_tokens is not None, "max_length": max_tokens, "verbose": False}
    for first in tqdm(range(0, len(texts), TOKENIZED_AT_ONCE), "tokenize", disable=not show, leave=False):
        batch = texts[first : first + TOKENIZED_AT_ONCE]
        found += [np.asarray(row, np.int32) for row in tokenizer(batch, **options)["input_ids"]]
    return found


def with_special_tokens(tokens, tokenizer, max_length):
    """[CLS] tokens [SEP], cut to `max_length`."""
    ends = np.array([tokenizer.cls_token_id, tokenizer.sep_token_id], np.int32)
    return np.concatenate((ends[:1], tokens[: max_length - 2], ends[1:]))


class DocumentBatches:
    """Micro-batches of labelled documents. targets: float32 (documents, labels) for multi-label, else int64 class
    numbers (documents,)."""

    def __init__(self, sequences, targets, batch_size, max_batch_tokens, unpad, seed, pad_id):
        self.sequences, self.targets = sequences, targets
        self.batch_size, self.max_batch_tokens, self.unpad = batch_size, max_batch_tokens, unpad
        self.seed, self.pad_id = seed, pad_id

    def length(self, place):
        """Tokens of an example."""
        return len(self.sequences[place])

    def collate(self, places):
        """Model inputs of the documents at `places`."""
        sequences = [self.sequences[place] for place in places]
        return pack(sequences) if self.unpad else pad(sequences, self.pad_id)

    def groups(self, places):
        """`places` in lists that fit the budget of tokens."""
        groups = group_by_length([self.length(place) for place in places], self.max_batch_tokens, self.unpad)
        return [[places[i] for i in group] for group in groups]

    def __call__(self, step, rank, world):
        """What `TextTrainer` asks for. batch_size documents for each process; `world` times that make a step."""
        places = step_indices(len(self.sequences), step, self.batch_size * world, self.seed)
        # dealt out by length, so that processes finish together
        places = sorted(places, key=lambda place: -self.length(place))[rank::world]
        return [
            {
                **self.collate(group),
                "targets": torch.from_numpy(self.targets[group]),
                "share": 1 / len(places),
                "num_tokens": sum(self.length(place) for place in group),
            }
            for group in self.groups(places)
        ]
