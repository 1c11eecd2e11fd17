# SPDX-License-Identifier: Apache-2.0
"""Training state as safetensors files and one JSON, written so that a kill at any moment leaves a whole state.

    <folder>/model.safetensors, exp_avg.safetensors, exp_avg_sq.safetensors   fp32, by parameter name
    <folder>/ema.safetensors                                                  the same, where weights are averaged
    <folder>/trainer_state.json                                               position, arguments, sha256 of each file

Nothing is pickled, so a state from a stranger cannot run code. A new state is written beside the old one and moved
into its place; between the two renames the old state is `<folder>.old`, which `load_state` finds by itself.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_FILE = "trainer_state.json"


class StateError(ValueError):
    """A training state that is missing, truncated, altered, or of another model."""


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_state(folder, parts, trainer_state):
    """parts: {part: {parameter name: tensor}} as of `gather_tensors`; trainer_state: JSON-able dict."""
    folder = Path(folder)
    fresh, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    digests = {}
    for part, tensors in parts.items():
        path = fresh / f"{part}.safetensors"
        save_file({name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}, path)
        digests[path.name] = _digest(path)
    (fresh / STATE_FILE).write_text(json.dumps({**trainer_state, "sha256": digests}, indent=1) + "\n")
    for path in fresh.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find_state(folder):
    """The state folder meant by `folder`: itself, or the `checkpoint` in an output folder, or its `.old` twin."""
    folder = Path(folder)
    nested = folder / "checkpoint"
    for candidate in (folder, nested, folder.with_name(f"{folder.name}.old"), folder / "checkpoint.old"):
        if (candidate / STATE_FILE).is_file():
            return candidate
    raise StateError(f"no {STATE_FILE} in {folder} or {nested}; give the folder that an earlier run saved its state in")


def load_state(folder):
    """Returns (parts, trainer_state). Raises StateError naming the file that is missing, truncated or altered."""
    folder = find_state(folder)
    try:
        trainer_state = json.loads((folder / STATE_FILE).read_text())
        digests = dict(trainer_state.pop("sha256"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{folder / STATE_FILE} is no training state ({error!r}); resume from another") from None
    parts = {}
    for name, digest in digests.items():
        path = folder / Path(name).name  # whatever the file says, nothing outside of the folder is read
        if not path.is_file():
            raise StateError(f"{path} is missing; the state needs all of {', '.join(digests)}")
        if _digest(path) != digest:
            raise StateError(f"{path} was truncated or altered (its sha256 is not the one in {STATE_FILE}); use a copy")
        try:
            parts[path.stem] = load_file(path)
        except SafetensorError as error:
            raise StateError(f"{path} is not a safetensors file ({error})") from None
    return parts, trainer_state


def _targets(module, ema):
    """{part: {parameter name: tensor}} of the weights; `ema` is None where no averaged copy is kept."""
    averaged = {} if ema is None else {"ema": dict(ema.named_parameters())}
    return {"model": dict(module.named_parameters()), **averaged}


def gather_tensors(module, ema, optimizer):
    """`parts` of save_state from a module, its averaged copy (or None) and its AdamW."""
    named = dict(module.named_parameters())
    moments = {
        key: {name: optimizer.state[p].get(key, torch.zeros_like(p)) for name, p in named.items()} for key in MOMENTS
    }
    return {**_targets(module, ema), **moments}


@torch.no_grad()
def restore_tensors(parts, folder, module, ema, optimizer, step):
    """The reverse, in place. Raises StateError where names or shapes differ (state of another model)."""
    named = dict(module.named_parameters())
    moments = {key: {n: torch.zeros_like(p) for n, p in named.items()} for key in MOMENTS}
    targets = {**_targets(module, ema), **moments}
    if parts.keys() != targets.keys():
        raise StateError(f"{folder} holds {', '.join(parts)}; expected {', '.join(targets)}: it is of another training")
    for part, target in targets.items():
        path, source = folder / f"{part}.safetensors", parts[part]
        missing, unknown = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
        if missing or unknown:
            raise StateError(f"{path} is of another model: it lacks {missing[:3]} and has unknown {unknown[:3]}")
        for name, value in target.items():
            if source[name].shape != value.shape:
                there, here = tuple(source[name].shape), tuple(value.shape)
                raise StateError(f"{path} is of another model: {name} has shape {there}, here it has {here}")
            value.copy_(source[name])
    for name, parameter in named.items():
        count = torch.tensor(float(step), device=parameter.device)
        optimizer.state[parameter] = {"step": count, **{key: tensors[name] for key, tensors in moments.items()}}
