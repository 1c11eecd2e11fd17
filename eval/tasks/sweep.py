# SPDX-License-Identifier: Apache-2.0
"""One training for each length and seed, each in a folder of its own, skipped where it was finished before."""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
from metrics.multilabel_f1 import bootstrap_weights, interval
from tasks.training_state import STATE_FILE, StateError, find_state

# arguments that change neither data nor weights nor scores of a run
NEUTRAL = {
    *("output_dir", "resume_from_checkpoint", "max_train_minutes", "logging_steps", "checkpointing_steps"),
    *("with_tracking", "report_to", "push_to_hub", "hub_model_id", "hub_token", "do_train", "max_batch_tokens"),
}
PATHS = {"model_name_or_path", "config_name", "tokenizer_name", "train_file", "validation_file", "dataset_name"}


@dataclasses.dataclass
class Run:
    """length: in tokens; args: the script's arguments with one length and one seed; result: None until it is done."""

    name: str
    length: int
    seed: int
    args: argparse.Namespace
    result: dict | None = None

    @property
    def folder(self):
        return Path(self.args.output_dir)

    def _arguments(self):
        """What the result depends on. Of paths the last part: the data may lie elsewhere when the run goes on."""
        kept = {key: value for key, value in vars(self.args).items() if key not in NEUTRAL}
        for key in PATHS & kept.keys():
            if isinstance(kept[key], str):
                kept[key] = Path(kept[key]).name
            elif kept[key]:
                kept[key] = [Path(path).name for path in kept[key]]
        return kept

    def keep(self, result):
        """Write the result beside what was trained."""
        partial = self.folder / "result.tmp"
        partial.write_text(json.dumps({"arguments": self._arguments(), "result": result}, indent=1) + "\n")
        os.replace(partial, self.folder / "result.json")

    def look(self):
        """Take over the result of an earlier call. Raises ValueError where that had other arguments."""
        path = self.folder / "result.json"
        if not path.is_file():
            return
        try:
            kept = json.loads(path.read_text())
            before, self.result = kept["arguments"], kept["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); remove it to evaluate this run again") from None
        now = json.loads(json.dumps(self._arguments()))
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if changed:
            key = changed[0]
            raise ValueError(
                f"{path} was made with --{key} {before.get(key)!r}, now it is {now.get(key)!r}; "
                "choose another --output_dir, or the same arguments to go on"
            )


def number_list(text):
    """Type of an argument such as 512,1024,2048: sorted list of different positive numbers, or zero."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 512,1024,2048") from None
    if numbers[0] < 0:
        raise argparse.ArgumentTypeError(f"{text!r} holds a negative number")
    return numbers


def plan_runs(args):
    """A Run for each length in args.max_length and each seed in args.seed. One alone is in the output folder itself."""
    lengths, runs = args.max_length, []
    alone = len(lengths) == len(args.seed) == 1
    for length in lengths:
        for seed in args.seed:
            name = f"{length}" if len(args.seed) == 1 else f"{length}-seed{seed}"
            own = argparse.Namespace(**vars(args))
            own.max_length, own.seed = length, seed
            if not alone:
                own.output_dir = str(Path(args.output_dir) / name)
                Path(own.output_dir).mkdir(parents=True, exist_ok=True)
                if args.resume_from_checkpoint:
                    own.resume_from_checkpoint = _resumable(Path(args.resume_from_checkpoint) / name)
            runs.append(Run(name, length, seed, own))
    if not alone and args.resume_from_checkpoint and not any(run.args.resume_from_checkpoint for run in runs):
        raise StateError(f"no {STATE_FILE} of any run in {args.resume_from_checkpoint}; leave out the option to begin")
    return runs


def _resumable(folder):
    try:
        return str(find_state(folder))
    except StateError:
        return None  # this run has not begun


def run_all(runs, args, started, one_run, main):
    """`one_run(run)` for every run that is not done; it returns a result, or None where it was stopped.

    started: time.monotonic() at the start of the script, from which --max_train_minutes counts; main: whether this is
    the main process. True if all is done."""
    for run in runs:
        if args.do_train and args.resume_from_checkpoint:
            run.look()
        if run.result is not None:
            continue
        if args.max_train_minutes:
            # a run whose time is over still makes a step or two: all processes must come to the same decision
            run.args.max_train_minutes = max(1e-3, args.max_train_minutes - (time.monotonic() - started) / 60)
        run.result = one_run(run)
        if run.result is None:
            return False
        if main and args.do_train:
            run.keep(run.result)
    return True


@dataclasses.dataclass
class Point:
    """One length of a sweep: the mean over its seeds, and the gain over the shortest length, with 95% intervals."""

    length: int
    value: float
    ci95: list
    gain: float
    gain_ci95: list
    results: list

    def interval(self, form, times=1, gain=False):
        """The interval of the score, or of the gain, as text."""
        low, high = self.gain_ci95 if gain else self.ci95
        return f"{low * times:{form}} to {high * times:{form}}"

    def mean(self, key, form):
        """Mean of a number over the seeds, formatted; empty where none of them has it."""
        values = [result[key] for result in self.results if result[key] is not None]
        return format(sum(values) / len(values), form) if values else ""


def compare(runs, name, read):
    """The Points of a sweep whose runs are done.

    Each run has a file `name` (npz); read(file) gives sums (units, k), the same units in every run, and the function
    by which the score follows from their totals. Units are drawn with replacement, the same for all runs."""
    sums, score = {}, None
    for run in runs:
        with np.load(run.folder / name, allow_pickle=False) as file:
            units, score = read(file)
        sums.setdefault(run.length, []).append(units)
    lengths = sorted(sums)
    weights = bootstrap_weights(len(sums[lengths[0]][0]))
    values = {length: float(np.mean([score(*units.sum(0)) for units in sums[length]])) for length in lengths}
    drawn = {length: np.mean([score(*(weights @ units).T) for units in sums[length]], 0) for length in lengths}
    shortest = lengths[0]
    return [
        Point(
            length,
            values[length],
            interval(drawn[length]),
            values[length] - values[shortest],
            interval(drawn[length] - drawn[shortest]),
            [run.result for run in runs if run.length == length],
        )
        for length in lengths
    ]


def format_table(rows):
    """Markdown of a list of dicts with the same keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
