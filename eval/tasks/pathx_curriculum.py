# SPDX-License-Identifier: Apache-2.0
"""Stages of a resolution curriculum and the endless, exactly resumable image source of each.

Dashes do not scale: every stage has the dash length, gap, thickness and markers of the full task, on a smaller canvas
with shorter curves and fewer distractors. With positions in absolute pixels a model then moves up unchanged.
"""

import dataclasses
import signal

import numpy as np
import torch
from tasks.pathfinder import PathfinderSpec, generate_samples, split_seed
from tasks.pathx_model import trace_map
from torch.utils.data import DataLoader, Dataset

CURRICULA = {  # size of the task's images: its stages
    32: "32:4:4:1000:256,32:9:10:1500:256,32:::3500:256",
    64: "48:3:4:800:128,64:5:6:1200:64,64:9:9:1200:64,64:::2400:64",
    128: "48:3:4:800:128,64:5:6:1200:64,96:9:10:1200:32,128:::2200:32",
    256: "192:::500:24,256:::2000:16",  # of a Path-X model: the border of 22 pixels leaves no room on a small canvas
}
STAGE_IMAGES = 2**32  # distance, in the train split, between the first images of two stages


@dataclasses.dataclass(frozen=True)
class Stage:
    size: int
    contour_length: int | None
    num_distractors: int | None
    steps: int
    batch_size: int | None

    def spec(self, preset):
        """PathfinderSpec of this stage; `preset` is the size of the full task, whose dashes every stage has."""
        full = PathfinderSpec.preset(preset)
        changes = {"size": self.size}
        if self.contour_length is not None:
            changes["contour_length"] = self.contour_length
        if self.num_distractors is not None:
            changes["num_distractors"] = self.num_distractors
        # Curves start in the box [2 d, size - 2 d). 24 pixels of it are room enough to make images fast (thousands a
        # second and core); the tighter the box, the more curves run into each other and are thrown away.
        if self.size != full.size:
            changes["seed_distance"] = min(full.seed_distance, max(4, (self.size - 24) // 4))
        return dataclasses.replace(full, **changes)


def parse_curriculum(text):
    """List of Stage from "size:contour_length:num_distractors:steps[:batch_size],..."; an empty field is the task's.

    Raises ValueError naming the stage."""
    stages = []
    for number, part in enumerate(text.split(","), 1):
        fields = [field.strip() for field in part.split(":")]
        where = f"curriculum stage {number} ({part.strip()!r})"
        if len(fields) not in (4, 5):
            raise ValueError(
                f"{where} has {len(fields)} fields; write size:contour_length:num_distractors:steps[:batch_size], "
                f"for example 64:6:4:1000:64, or 128:::1000 for the task's own contours and distractors"
            )
        try:
            values = [int(field) if field else None for field in fields] + [None] * (5 - len(fields))
        except ValueError:
            raise ValueError(f"{where} must hold whole numbers between its colons") from None
        size, contour, distractors, steps, batch = values
        if size is None or size < 16 or size % 8:
            raise ValueError(f"{where}: size must be a multiple of 8, at least 16 (images are cut into 8 x 8 tiles)")
        if steps is None or steps < 1 or (batch is not None and batch < 1):
            raise ValueError(f"{where}: steps and batch_size must be at least 1")
        if (contour is not None and contour < 2) or (distractors is not None and distractors < 0):
            raise ValueError(f"{where}: contour_length must be at least 2 and num_distractors at least 0")
        stages.append(Stage(*values))
    return stages


class Chunks(Dataset):
    """Chunk c of stage number `stage` of the run with seed `base_seed`: `chunk_size` images made on the spot, the same
    whoever asks and whenever. Several renderings take turns image by image."""

    def __init__(self, spec, chunk_size, renderings, stage, base_seed):
        self.spec, self.chunk_size, self.renderings = spec, chunk_size, renderings
        self.stage, self.base_seed = stage, base_seed

    def __getitem__(self, chunk):
        """images uint8 (n, S, S), trace uint8 (n, S, S), labels int64 (n,)."""
        first = self.stage * STAGE_IMAGES + chunk * self.chunk_size
        seeds = [split_seed("train", first + index, self.base_seed) for index in range(self.chunk_size)]
        turns = len(self.renderings)
        parts = [
            generate_samples(self.spec, seeds[turn::turns], rendering, num_workers=1)
            for turn, rendering in enumerate(self.renderings[: self.chunk_size])
        ]
        images = np.concatenate([part.image for part in parts])
        trace = np.concatenate([trace_map(part.curve_ids, part.marked) for part in parts])
        labels = np.concatenate([part.label for part in parts])
        return torch.from_numpy(images), torch.from_numpy(trace), torch.from_numpy(labels)


def _leave_signals_to_the_trainer(worker):
    # Ctrl-C and `timeout` signal the whole process group; the images of the step under way are still needed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def chunk_loader(chunks, first, last, stride, num_workers, pin_memory):
    """DataLoader over chunks first, first + stride, ... < last, in that order whatever the number of workers."""
    return DataLoader(
        chunks,
        batch_size=None,
        sampler=range(first, last, stride),
        num_workers=num_workers,
        generator=torch.Generator(),  # its own: one draw from the global stream here would break exact resume
        worker_init_fn=_leave_signals_to_the_trainer,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pin_memory,
    )


class ImageSource:
    """Batches of one stage for one process, on its device. With echo > 1 each batch holds batch/echo new images and
    fills up from a window of earlier ones, so that a slow generator does not starve the device; an image is used
    `echo` times on average, each time under another symmetry."""

    WINDOW = 64  # chunks kept; regenerated on resume, hence short

    def __init__(self, chunks, batch_size, echo, first, last, rank, world, num_workers, device):
        """Yields the batches of micro-steps first .. last - 1."""
        self.device, self.echo, self.first = device, echo, first
        self.reused = batch_size - chunks.chunk_size
        self.start = max(0, first - self.WINDOW) if echo > 1 else first
        sampler = (self.start * world + rank, last * world, world)
        self.loader = chunk_loader(chunks, *sampler, num_workers, device.type == "cuda")

    def __iter__(self):
        window = []
        for position, chunk in enumerate(self.loader, self.start):
            chunk = [part.to(self.device, non_blocking=True) for part in chunk]
            if self.reused:
                size = len(chunk[2])
                if not window:
                    window = [part.new_empty(self.WINDOW * size, *part.shape[1:]) for part in chunk]
                slot = position % self.WINDOW * size
                for kept, part in zip(window, chunk, strict=True):
                    kept[slot : slot + size] = part
            if position < self.first:
                continue
            if self.reused:
                filled = min(position + 1, self.WINDOW) * size
                pick = torch.randint(filled, (self.reused,)).to(self.device, non_blocking=True)
                chunk = [torch.cat((part, kept[pick])) for part, kept in zip(chunk, window, strict=True)]
            yield chunk
