# SPDX-License-Identifier: Apache-2.0
"""Scores of a Pathfinder classifier: accuracy with intervals, the marker-distance baseline, predictions."""

import dataclasses
import hashlib
import itertools
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from metrics.accuracy import accuracy_with_interval
from tasks.pathfinder import PathfinderDataset, PathfinderSpec
from tasks.pathx_curriculum import CURRICULA
from tasks.pathx_figures import draw_sheet
from tasks.script import compute_metric
from tasks.training_loop import bar_interval
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from flash_models import images_to_input_ids

UNREADABLE = (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)  # of an npz
SAVE_EVERY = 60  # seconds between two writes of the predictions of an evaluation under way


@torch.no_grad()  # not inference_mode: position tables made here are cached and serve training too
def predict(model, images, batch_size, accelerator):
    """P(connected), fp32 (n,) on the CPU, of uint8 (n, S, S) images."""
    chances = []
    for batch in images.split(batch_size):
        input_ids = images_to_input_ids(batch.to(accelerator.device, non_blocking=True), model.config)
        with accelerator.autocast():
            logits = model(input_ids=input_ids).logits
        chances.append(logits.float().softmax(-1)[:, 1])
    return torch.cat(chances).cpu()


class GivenImages(Dataset):
    """Items {"image": uint8 (S, S), "label": int} of an npz file with `images` (n, S, S) and `labels` (n,).

    Raises ValueError where the file is something else."""

    def __init__(self, path):
        try:
            with np.load(path, allow_pickle=False) as file:
                images, labels = file["images"], file["labels"]
        except UNREADABLE as error:
            raise ValueError(f"{path} is no npz file with arrays `images` and `labels` ({error})") from None
        if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1] != images.shape[2] or not len(images):
            raise ValueError(f"{path}: images are {images.dtype} {images.shape}; expected uint8 (n, size, size)")
        if labels.shape != images.shape[:1] or not np.isin(labels, (0, 1)).all():
            raise ValueError(f"{path}: labels have shape {labels.shape}; expected {images.shape[:1]} zeros and ones")
        self.images, self.labels = torch.from_numpy(images), labels.astype(np.int64)
        self.size = images.shape[1]
        self.digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": int(self.labels[index])}


def image_sets(args, accelerator):
    """What is asked for, set by set: (name, dataset with a `size`, PathfinderSpec, source, key of its predictions).

    Easier curves, of 9 and 6 dashes, come with distractors of 3 and 2, as in the sets of the Long Range Arena."""
    if args.images_file:
        dataset = GivenImages(args.images_file)
        spec = PathfinderSpec.preset(dataset.size if dataset.size in CURRICULA else args.image_size)
        yield Path(args.images_file).stem, dataset, spec, Path(args.images_file).name, dataset.digest
        return
    full = PathfinderSpec.preset(args.image_size)
    for length, rendering in itertools.product(args.contour_length, args.rendering):
        spec = dataclasses.replace(full, contour_length=length, distractor_length=max(1, length // 3))
        show = accelerator.is_local_main_process
        options = {"rendering": rendering, "cache_dir": args.data_cache_dir, "progress": show}
        dataset = PathfinderDataset(spec, args.eval_split, args.num_eval_samples, **options)
        name = rendering if spec == full else f"{rendering}_contour_{length}"
        yield name, dataset, spec, args.eval_split, f"{spec} {args.eval_split} {rendering}"


def find_markers(images, radius):
    """(y, x) of the two marker disks, int64 (n, 2, 2), in uint8 (n, S, S) images: the two brightest solid squares."""
    width = max(3, 2 * int(radius) - 1)
    size, reach = images.shape[-1], 2 * int(radius + 1)
    found = []
    for batch in images.split(256):
        score = F.avg_pool2d(batch[:, None].float(), width, 1, width // 2)[:, 0]
        first = score.flatten(1).argmax(1)
        y, x = (first // size)[:, None, None], (first % size)[:, None, None]
        grid = torch.arange(size)
        near = ((grid[:, None] - y).abs() <= reach) & ((grid - x).abs() <= reach)
        second = score.masked_fill(near, -1).flatten(1).argmax(1)
        found.append(torch.stack([torch.stack((at // size, at % size), 1) for at in (first, second)], 1))
    return torch.cat(found)


def best_threshold_accuracy(values, labels):
    """Accuracy of the best "label = values above (or below) t" over all t, chosen on these very samples."""
    order = np.argsort(values, kind="stable")
    ordered, values = np.asarray(labels)[order], np.asarray(values)[order]
    above = np.concatenate(([0], np.cumsum(1 - ordered))) + ordered.sum() - np.concatenate(([0], np.cumsum(ordered)))
    # a threshold cannot lie between two equal values
    cuts = np.concatenate(([True], values[1:] != values[:-1], [True]))
    return float(max(above[cuts].max(), len(ordered) - above[cuts].min()) / len(ordered))


def fingerprint(model, key):
    """Hash of the weights and of the name of the images: predictions of another model or set are never taken over."""
    digest = hashlib.sha256(key.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _earlier_predictions(path, key):
    try:
        with np.load(path, allow_pickle=False) as file:
            return list(file["chances"]) if str(file["key"]) == key else []
    except UNREADABLE:
        return []


def evaluate_images(model, dataset, name, radius, key, args, accelerator):
    """Score `model` on a dataset of {"image": uint8 (S, S), "label": int}. Returns the result (JSON-able; None outside
    the main process) and writes predictions_<name>.npz and sheet_<name>.png. `key` says which images they are: an
    evaluation of the same weights on the same images continues where an earlier one stopped.

    radius: of the markers, in pixels."""
    main = accelerator.is_main_process
    path = Path(args.output_dir) / f"predictions_{name}.npz"
    key = fingerprint(model, key)
    chances = _earlier_predictions(path, key)[: len(dataset)]
    kept = len(chances)
    rest = Subset(dataset, range(kept, len(dataset)))
    loader = accelerator.prepare(DataLoader(rest, args.per_device_eval_batch_size))
    bar = tqdm(total=len(dataset), initial=kept, desc=f"evaluate {name}", disable=not main, mininterval=bar_interval())
    seconds, timed, saved = 0.0, 0, time.monotonic()
    for number, batch in enumerate(loader):
        begun = time.monotonic()
        guess = predict(model, batch["image"], len(batch["image"]), accelerator).to(accelerator.device)
        guess = accelerator.gather_for_metrics(guess).tolist()
        # the first batch carries compilation and warm-up, so it counts only if it is the only one
        if number == 1:
            seconds, timed = 0.0, 0
        seconds, timed = seconds + time.monotonic() - begun, timed + len(guess)
        chances.extend(guess)
        bar.update(len(guess))
        if main and time.monotonic() - saved > SAVE_EVERY:
            _write_predictions(path, key, chances)
            saved = time.monotonic()
    bar.close()
    if not main:
        return None
    items = [dataset[index] for index in range(len(dataset))]
    images, labels = torch.stack([item["image"] for item in items]), np.array([item["label"] for item in items])
    _write_predictions(path, key, chances, labels)
    chances = np.array(chances)
    chosen = (chances > 0.5).astype(int)
    markers = find_markers(images, radius)
    distance = (markers[:, 0] - markers[:, 1]).double().norm(dim=1).numpy()
    draw_sheet(images, labels, chances, markers, radius, path.with_name(f"sheet_{name}.png"))
    return {
        **compute_metric("accuracy", accuracy_with_interval, predictions=chosen, references=labels),
        "marker_distance_baseline": best_threshold_accuracy(distance, labels),
        "images_per_second": timed / seconds if seconds else None,
        "resumed_from": kept,
    }


def _write_predictions(path, key, chances, labels=()):
    partial = path.with_name(f"{path.stem}.tmp.npz")
    np.savez(partial, key=np.array(key), chances=np.array(chances, np.float32), labels=np.array(labels, np.uint8))
    os.replace(partial, path)
