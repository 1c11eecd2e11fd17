# SPDX-License-Identifier: Apache-2.0
"""Examples of the Long Range Arena: made here (ListOps, Pathfinder), from files, or from the Hub."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from tasks import lra_listops
from tasks.documents import DocumentBatches
from tasks.lra_tasks import CLS, PAD, TASKS
from tasks.pathfinder import PathfinderDataset, PathfinderSpec
from tasks.pathx_evaluation import UNREADABLE
from tasks.pathx_model import check_fits
from tasks.text_files import Rows, join_text, kind_of, read_dataset, read_rows
from tasks.token_batches import pack, pad

from flash_models import images_to_input_ids

AAN_COLUMNS = ["label", "id1", "id2", "text1", "text2"]  # of the released Retrieval files, which have no header
CIFAR_ROW = 1 + 3 * 32 * 32  # bytes of an image in CIFAR-10's binary version: its label, then red, green and blue


@dataclasses.dataclass
class Examples:
    """items: uint8 arrays, of tokens or (side, side) of grey levels, or pairs of arrays of tokens; labels: names of
    classes; problems: what was left out of the source, and why."""

    source: str
    items: list
    labels: list
    problems: list = dataclasses.field(default_factory=list)

    def __len__(self):
        return len(self.labels)


def _bytes(row, column):
    text = join_text(row.get(column))
    if text is None:
        raise ValueError(f"column {column!r} holds {type(row.get(column)).__name__}; expected text")
    return np.frombuffer(text.encode(), np.uint8)


def _grey(images):
    """uint8 (..., S, S) of (..., S, S, 3): luma as in ITU-R BT.601."""
    return (images @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)


def _item(name, row):
    """The item of a row. Raises ValueError that says what it lacks."""
    columns = TASKS[name].columns
    if name == "image":
        image = np.asarray(row[columns[0]].convert("RGB"))
        if image.shape != (32, 32, 3):
            raise ValueError(f"an image of {image.shape[0]} x {image.shape[1]} pixels; expected 32 x 32")
        return _grey(image)
    if name == "listops":
        return lra_listops.parse(_bytes(row, columns[0]).tobytes().decode())
    parts = tuple(_bytes(row, column) for column in columns)
    return parts if name == "retrieval" else parts[0]


def from_rows(name, rows, source):
    """Examples of Rows. Raises ValueError where a column is missing or not one row is right."""
    task = TASKS[name]
    wanted, columns = {*task.columns, task.label}, {column for _, row in rows[:100] for column in row}
    if not wanted <= columns:
        raise ValueError(f"{source} has the columns {sorted(columns)}; {name} needs {sorted(wanted)}")
    examples = Examples(source, [], [], rows.problems)
    for place, row in rows:
        label = row.get(task.label)
        try:
            if not isinstance(label, (str, int, float)) or not str(label).strip():
                raise ValueError(f"column {task.label!r} holds {label!r}; expected a class")
            if task.names and str(label) not in task.names:
                raise ValueError(f"class {label!r} is none of {name}: {', '.join(task.names)}")
            examples.items.append(_item(name, row))
        except ValueError as error:
            rows.skip(place, str(error))
            continue
        examples.labels.append(str(label))
    if not examples.items:
        raise ValueError(f"{source} has no {name} example. The first problem: {rows.problems[0]}")
    return examples


def _read_images(name, path):
    if path.suffix == ".bin":
        content = np.frombuffer(path.read_bytes(), np.uint8)
        if name != "image" or not len(content) or len(content) % CIFAR_ROW:
            raise ValueError(f"{path} has {len(content):,} bytes; CIFAR-10's binary files have {CIFAR_ROW} an image")
        table = content.reshape(-1, CIFAR_ROW)
        images, labels = _grey(table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), table[:, 0].astype(np.int64)
    else:
        try:
            with np.load(path, allow_pickle=False) as file:
                images, labels = file["images"], file["labels"]
        except FileNotFoundError:
            raise
        except UNREADABLE as error:
            raise ValueError(f"{path} is no npz file with arrays `images` and `labels` ({error})") from None
        if images.dtype != np.uint8 or images.shape[1:] not in ((32, 32), (32, 32, 3)) or not len(images):
            raise ValueError(f"{path}: images are {images.dtype} {images.shape}; expected uint8 (n, 32, 32) or RGB")
        images = _grey(images) if images.ndim == 4 else images
    names = TASKS[name].names or tuple("0123456789")
    if (
        labels.shape != images.shape[:1]
        or labels.dtype.kind not in "iu"
        or not np.isin(labels, range(len(names))).all()
    ):
        raise ValueError(f"{path}: labels must be {len(images)} whole numbers from 0 to {len(names) - 1}")
    return Examples(path.name, list(images), [names[label] for label in labels])


def read_files(name, paths):
    """Examples of all the files. Raises ValueError naming the file that is something else."""
    parts = []
    for path in map(Path, paths):
        if name in ("image", "pathfinder"):
            parts.append(_read_images(name, path))
        else:
            columns = AAN_COLUMNS if name == "retrieval" and kind_of(path) == ".tsv" else None
            parts.append(from_rows(name, read_rows(path, columns), path.name))
    merged = {field: sum((getattr(part, field) for part in parts), []) for field in ("items", "labels", "problems")}
    return Examples(", ".join(part.source for part in parts), **merged)


def load_split(name, split, args, show):
    """Examples of a split that is made here, or of a Hub data set."""
    if name == "listops":
        count = args.num_train_samples if split == "train" else args.num_eval_samples
        items, labels = lra_listops.load(split, count, args.data_cache_dir, args.num_workers, show=show)
        return Examples(f"ListOps, {split}", items, [str(label) for label in labels])
    if name == "pathfinder":
        count = args.num_train_samples if split == "train" else args.num_eval_samples
        spec, cache = PathfinderSpec.preset(32), args.data_cache_dir
        dataset = PathfinderDataset(spec, split, count, cache_dir=cache, num_workers=args.num_workers, progress=show)
        images = [dataset[number] for number in range(len(dataset))]
        labels = [TASKS[name].names[item["label"]] for item in images]
        return Examples(f"Pathfinder-32, {split}", [item["image"].numpy() for item in images], labels)
    source = args.dataset_name or TASKS[name].dataset
    rows = read_dataset(source, args.dataset_config_name, split)
    if rows is None:
        raise ValueError(f"{source} has no split {split!r}; name another with --eval_split, or give files")
    return from_rows(name, Rows(rows, rows.problems), f"{source}, {split}")


def class_names(name, examples):
    """Names of the classes. Raises ValueError where there is only one."""
    found = TASKS[name].names or sorted(set(examples.labels), key=lambda label: (len(label), label))
    if len(set(examples.labels)) < 2:
        raise ValueError(f"all {len(examples)} examples of {examples.source} are of the class {examples.labels[0]!r}")
    return list(found)


def targets_of(name, examples, config):
    """int64 (examples,) class numbers of the model of `config`. Raises ValueError for a class that it does not have."""
    names = TASKS[name].names
    label2id = config.label2id if names is None else {label: number for number, label in enumerate(names)}
    if len(label2id) != config.num_labels:
        raise ValueError(f"{name} has {len(label2id)} classes and the model {config.num_labels}; take one made for it")
    unknown = sorted(set(examples.labels) - label2id.keys())
    if unknown:
        raise ValueError(f"{examples.source} has the class {unknown[0]!r}; the model knows {', '.join(label2id)}")
    return np.array([label2id[label] for label in examples.labels], np.int64)


def encode(examples, config):
    """Token ids of each example, int16 arrays or pairs of them, [CLS] and the tokens, cut to what the model of
    `config` reads, or, row by row, the pixels. A rotary_2d model has its own order of pixels and tokens in front."""

    def sequence(tokens):
        return np.concatenate(([CLS], tokens[: config.max_position_embeddings - 1])).astype(np.int16)

    items = examples.items
    if isinstance(items[0], tuple):
        return [tuple(map(sequence, pair)) for pair in items]
    if items[0].ndim == 2 and config.position_embedding_type == "rotary_2d":
        check_fits(config, len(items[0]))
        images = torch.from_numpy(np.stack(items))
        return [row for part in images.split(1000) for row in images_to_input_ids(part, config).short().numpy()]
    room = config.max_position_embeddings
    if items[0].ndim == 2 and items[0].size >= room:
        raise ValueError(f"an image is {1 + items[0].size} tokens, the model reads {room}; leave out --max_length")
    return [sequence(item.ravel()) for item in items]


class SequenceBatches(DocumentBatches):
    """Micro-batches of sequences, or of pairs, which become two rows each. What is of one length is neither padded nor
    packed."""

    def __init__(self, sequences, targets, batch_size, max_batch_tokens, unpad, seed):
        super().__init__(sequences, targets, batch_size, max_batch_tokens, unpad, seed, PAD)

    def _rows(self, place):
        item = self.sequences[place]
        return item if isinstance(item, tuple) else (item,)

    def length(self, place):
        lengths = [len(row) for row in self._rows(place)]
        return sum(lengths) if self.unpad else len(lengths) * max(lengths)

    def collate(self, places):
        rows = [row for place in places for row in self._rows(place)]
        if len({len(row) for row in rows}) == 1:
            return {"input_ids": torch.from_numpy(np.stack(rows).astype(np.int64))}
        return pack(rows) if self.unpad else pad(rows, self.pad_id)
