# SPDX-License-Identifier: Apache-2.0
"""Pathfinder images for training: a split cached on disk, and an endless stream made on the fly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from .pathfinder_generate import SPLITS, generate_samples, split_seed

SHARD = 2000  # images per shard
BLOCK = 250  # images per step of the progress bar
GENERATOR_VERSION = 1  # raise it when a seed no longer gives the same image; caches are then made anew
_unwritable = set()


def cache_name(spec, split, rendering="lra", base_seed=0):
    """Folder name of a cache; the digest covers everything that its images depend on."""
    key = json.dumps([GENERATOR_VERSION, dataclasses.asdict(spec), split, rendering, base_seed], sort_keys=True)
    return f"pathfinder{spec.size}-{split}-{rendering}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def write_whole(path, write):
    """Write a file so that it is there whole or not at all; `write` gets the open file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class PathfinderDataset(Dataset):
    """Images 0 .. num_samples - 1 of a split, made once and kept in `cache_dir`.

    An item is a dict: image uint8 (size, size) and label int; with_curves adds curve_ids uint8 (size, size) and marked
    int64 (2,), see `Samples`. num_samples defaults to the split of the Long Range Arena (160,000, 20,000, 20,000).

    The cache is a folder of .npy shards of 2,000 images. A .json with rows and checksums is written after the arrays of
    its shard and vouches for them: an interrupted cache is continued, and a damaged shard is reported and made anew.
    If `cache_dir` is None or can not be written (one warning per folder) the images stay in memory. A cache serves any
    num_samples, and several processes may fill it at a time. progress: show a bar; num_workers: threads.
    """

    def __init__(
        self,
        spec,
        split,
        num_samples=None,
        rendering="lra",
        cache_dir=None,
        with_curves=False,
        num_workers=None,
        base_seed=0,
        progress=True,
    ):
        split_seed(split, 0, base_seed)  # raises for an unknown split or base seed
        self.num_samples = SPLITS[split] if num_samples is None else num_samples
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        self.spec, self.split, self.rendering, self.base_seed = spec, split, rendering, base_seed
        self.size = spec.size
        self.with_curves, self.num_workers = with_curves, num_workers
        self.parts = ("images", "facts", "curves") if with_curves else ("images", "facts")
        self.folder = None if cache_dir is None else Path(cache_dir) / cache_name(spec, split, rendering, base_seed)
        self.shards = {}
        title = f"pathfinder{spec.size} {split}"
        with tqdm(total=self.num_samples, desc=title, unit="img", disable=not progress) as bar:
            for shard in range(-(-self.num_samples // SHARD)):
                rows = min(SHARD, self.num_samples - shard * SHARD)
                self.shards[shard] = self._read(shard, rows)
                if self.shards[shard] is None:
                    self.shards[shard] = self._make(shard, rows, bar)
                bar.update(shard * SHARD + rows - bar.n)

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        if not 0 <= index < self.num_samples:
            raise IndexError(f"index {index} of {self.num_samples} samples")
        shard, row = divmod(index, SHARD)
        if self.shards[shard] is None:  # sent to another process, see __getstate__
            self.shards[shard] = self._open(shard)
        arrays = self.shards[shard]
        facts = np.array(arrays["facts"][row])
        item = {"image": torch.from_numpy(np.array(arrays["images"][row])), "label": int(facts[0])}
        if self.with_curves:
            item["curve_ids"] = torch.from_numpy(np.array(arrays["curves"][row]))
            item["marked"] = torch.from_numpy(facts[1:3])
        return item

    def __getstate__(self):
        """Without the mapped files, which pickle would copy."""
        shards = {k: None if isinstance(v["images"], np.memmap) else v for k, v in self.shards.items() if v is not None}
        return {**self.__dict__, "shards": {k: shards.get(k) for k in self.shards}}

    def _path(self, shard, part):
        return self.folder / (f"{shard:05d}.json" if part == "json" else f"{shard:05d}-{part}.npy")

    def _open(self, shard):
        return {part: np.load(self._path(shard, part), mmap_mode="r", allow_pickle=False) for part in self.parts}

    def _read(self, shard, rows):
        """Arrays of a shard by part, or None when there is no whole shard of enough rows."""
        if self.folder is None:
            return None
        try:
            record = json.loads(self._path(shard, "json").read_text())
            if record["rows"] < rows or not set(self.parts) <= set(record["crc32"]):
                return None
            arrays = self._open(shard)
            for part, array in arrays.items():
                if len(array) != record["rows"] or zlib.crc32(array) != record["crc32"][part]:
                    raise ValueError(f"{self._path(shard, part).name} does not match its checksum")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"shard {shard} of {self.folder} is damaged and made anew: {error}", stacklevel=3)
            return None
        return arrays

    def _make(self, shard, rows, bar):
        first, blocks = shard * SHARD, []
        for start in range(first, first + rows, BLOCK):
            seeds = [split_seed(self.split, i, self.base_seed) for i in range(start, min(start + BLOCK, first + rows))]
            blocks.append(generate_samples(self.spec, seeds, self.rendering, self.num_workers, self.with_curves))
            bar.update(len(seeds))
        facts = np.concatenate([np.column_stack([b.label, b.marked, b.markers.reshape(-1, 4)]) for b in blocks])
        arrays = {"images": np.concatenate([b.image for b in blocks]), "facts": facts}
        if self.with_curves:
            arrays["curves"] = np.concatenate([b.curve_ids for b in blocks])
        if self.folder is None or self.folder in _unwritable:
            return arrays
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part, array in arrays.items():
                write_whole(self._path(shard, part), lambda file, array=array: np.save(file, array, allow_pickle=False))
            record = {"rows": rows, "crc32": {part: zlib.crc32(array) for part, array in arrays.items()}}
            write_whole(self._path(shard, "json"), lambda file: file.write(json.dumps(record).encode()))
        except OSError as error:
            _unwritable.add(self.folder)
            warnings.warn(f"can not write the cache {self.folder} ({error}); images stay in memory", stacklevel=3)
            return arrays
        return self._open(shard)


class PathfinderStream(IterableDataset):
    """Endless new images of the "train" split, from image `start_index` of base seed `seed` on.

    Items are dicts: image and curve_ids uint8 (size, size), label int, marked int64 (2,). Every process (`rank` of
    `world_size`) and every DataLoader worker of it gets its own indices, interleaved, so no seed is used twice. Each
    iteration starts again at start_index; to go on, pass a start_index beyond the images already used.
    """

    def __init__(self, spec, start_index=0, seed=0, rendering="lra", rank=0, world_size=1):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be in [0, world_size = {world_size})")
        split_seed("train", start_index, seed)  # raises when out of range
        self.spec, self.start_index, self.seed, self.rendering = spec, start_index, seed, rendering
        self.rank, self.world_size = rank, world_size

    def __iter__(self):
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        lanes, at = self.world_size * workers, self.start_index + self.rank * workers + number
        while True:
            seeds = [split_seed("train", at + i * lanes, self.seed) for i in range(32)]
            at += 32 * lanes
            batch = generate_samples(self.spec, seeds, self.rendering)
            for i in range(32):
                yield {
                    "image": torch.from_numpy(batch.image[i]),
                    "label": int(batch.label[i]),
                    "curve_ids": torch.from_numpy(batch.curve_ids[i]),
                    "marked": torch.from_numpy(batch.marked[i]),
                }
