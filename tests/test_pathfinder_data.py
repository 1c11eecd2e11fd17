# SPDX-License-Identifier: Apache-2.0
"""Pathfinder splits, the cache of PathfinderDataset under interruption and damage, the endless stream, the script."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "eval"))

from tasks import pathfinder_data  # noqa: E402
from tasks.pathfinder import (  # noqa: E402
    SPLITS,
    PathfinderDataset,
    PathfinderSpec,
    PathfinderStream,
    generate,
    generate_batch,
    generate_samples,
    split_seed,
)

SMALL = PathfinderSpec.preset(32)


def test_splits_never_overlap():
    last = 2**50 - 1
    seeds = [
        split_seed(split, i, base) for split in SPLITS for i in (0, 1, 159_999, last) for base in (0, 1, 2**12 - 1)
    ]
    assert len(set(seeds)) == len(seeds) and 0 <= min(seeds) and max(seeds) < 2**64
    ranges = {split: (split_seed(split, 0, 0), split_seed(split, last, 2**12 - 1)) for split in SPLITS}
    ordered = sorted(ranges.values())
    assert all(high < low for (_, high), (low, _) in zip(ordered, ordered[1:], strict=False))
    for bad in (("dev", 0, 0), ("test", -1, 0), ("test", 2**50, 0), ("test", 0, 2**12)):
        with pytest.raises(ValueError, match="must be"):
            split_seed(*bad)


@pytest.fixture
def shards_of_20(monkeypatch):
    """Small shards, and a list of the number of images made by each call of the generator."""
    made = []

    def counted(spec, seeds, *arguments):
        made.append(len(seeds))
        return generate_samples(spec, seeds, *arguments)

    monkeypatch.setattr(pathfinder_data, "SHARD", 20)
    monkeypatch.setattr(pathfinder_data, "generate_samples", counted)
    return made


def dataset(folder, count=50, **options):
    return PathfinderDataset(SMALL, "test", count, cache_dir=folder, progress=False, **options)


def same_as_generated(data):
    for i in range(len(data)):
        item, sample = data[i], generate(SMALL, split_seed("test", i))
        assert item["label"] == sample.label
        np.testing.assert_array_equal(item["image"], sample.image)
        if "curve_ids" in item:
            np.testing.assert_array_equal(item["curve_ids"], sample.curve_ids)
            np.testing.assert_array_equal(item["marked"], sample.marked)
    return True


def test_dataset_is_cached(tmp_path, shards_of_20):
    assert same_as_generated(dataset(tmp_path)) and sum(shards_of_20) == 50
    assert same_as_generated(dataset(tmp_path)) and sum(shards_of_20) == 50
    assert len(dataset(tmp_path, 25)) == 25 and sum(shards_of_20) == 50
    assert same_as_generated(dataset(tmp_path, 60)) and sum(shards_of_20) == 50 + 20  # only the short last shard
    with_curves = dataset(tmp_path, with_curves=True)
    assert same_as_generated(with_curves) and sum(shards_of_20) == 70 + 50
    copy = pickle.loads(pickle.dumps(with_curves))  # as sent to a spawned DataLoader worker
    assert len(pickle.dumps(with_curves)) < 20_000 and same_as_generated(copy)
    with pytest.raises(IndexError):
        with_curves[50]
    other = PathfinderDataset(
        dataclasses.replace(SMALL, num_distractors=3), "test", 5, cache_dir=tmp_path, progress=False
    )
    assert other.folder != with_curves.folder


def test_interrupted_cache_is_continued(tmp_path, shards_of_20, monkeypatch):
    replace, calls = pathfinder_data.os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 5:  # the second file of the second shard
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(pathfinder_data.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset(tmp_path)
    monkeypatch.setattr(pathfinder_data.os, "replace", replace)
    assert not list(tmp_path.rglob("*.part"))
    assert sum(shards_of_20) == 40
    assert same_as_generated(dataset(tmp_path)) and sum(shards_of_20) == 40 + 30


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "header", "record", "other"])
def test_damaged_cache_is_noticed_and_made_anew(tmp_path, shards_of_20, harm):
    folder = dataset(tmp_path).folder
    file = folder / ("00001.json" if harm == "record" else "00001-images.npy")
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[5000] ^= 4
    elif harm == "truncate":
        content = content[:-100]
    elif harm == "header":
        content[:16] = bytes(16)
    elif harm == "other":
        content = (folder / "00000-images.npy").read_bytes()
    else:
        content = b"" if harm == "empty" else b"{"
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="shard 1 of .* is damaged and made anew"):
        data = dataset(tmp_path)
    assert same_as_generated(data) and sum(shards_of_20) == 50 + 20


def test_unwritable_cache_is_named_once(tmp_path, shards_of_20, recwarn):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    data = dataset(blocked / "cache")
    named = [str(w.message) for w in recwarn if "stay in memory" in str(w.message)]
    assert len(named) == 1 and str(blocked) in named[0]
    assert same_as_generated(data) and same_as_generated(pickle.loads(pickle.dumps(data)))
    assert same_as_generated(dataset(None, 25))


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_gives_every_seed_once(workers):
    count, seen = 24, []
    for rank in range(2):
        stream = PathfinderStream(SMALL, start_index=7, seed=3, rank=rank, world_size=2)
        items = iter(DataLoader(stream, batch_size=4, num_workers=workers))
        for _ in range(count // 4):
            batch = next(items)
            assert batch["image"].dtype == torch.uint8 and batch["curve_ids"].shape == (4, 32, 32)
            assert (batch["label"] == (batch["marked"][:, 0] == batch["marked"][:, 1])).all()
            seen += [image.tobytes() for image in batch["image"].numpy()]
    expected = generate_batch(SMALL, [split_seed("train", 7 + i, 3) for i in range(2 * count)])[0]
    assert sorted(seen) == sorted(image.tobytes() for image in expected)


def test_script(tmp_path):
    command = [
        sys.executable,
        "eval/tasks/pathfinder.py",
        "--size",
        "32",
        "--num_samples",
        "12",
        "--out",
        str(tmp_path),
    ]
    command += ["--preview", str(tmp_path / "sheet.png"), "--contour_length", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["num_samples"] == 12 and Path(result["folder"]).is_dir() and (tmp_path / "sheet.png").stat().st_size
    failed = subprocess.run([*command[:3], "40", *command[4:]], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2 and "no Pathfinder preset of size 40" in failed.stderr
