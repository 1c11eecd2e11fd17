# SPDX-License-Identifier: Apache-2.0
"""What every training of these scripts has in common: a clean stop, a log, an exactly resumable state."""

import contextlib
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tasks.training_state import find_state, gather_tensors, load_state, restore_tensors, save_state
from tqdm.auto import tqdm
from transformers import get_scheduler

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "warmup_stable_decay")
STOP_EVERY = 10  # steps between two looks, by several processes, at whether one of them was told to stop


def bar_interval():
    """Seconds between two updates of a progress bar: rare where stderr is a file."""
    return 1 if sys.stderr.isatty() else 30


def parameter_groups(module, weight_decay):
    """Weight decay for matrices alone: not for biases, norms and embeddings."""
    plain = [p for n, p in module.named_parameters() if p.ndim < 2 or "embeddings" in n]
    decayed = [p for n, p in module.named_parameters() if p.ndim >= 2 and "embeddings" not in n]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class TrainingLoop:
    """Base of the trainers. `module` holds every trained parameter; `total` counts the optimizer's steps; `ema` is the
    averaged copy of the model, or None.

    A subclass names in EXACT the arguments on which the data and updates still to come depend, and runs its steps
    inside `catching_signals`; where `_must_stop` says so it calls `_save` and returns. Its `_position` is what the
    state needs besides the number of steps.
    """

    EXACT = ()

    def __init__(self, args, accelerator, module, total, ema=None):
        self.args, self.accelerator, self.module, self.total, self.ema = args, accelerator, module, total, ema
        self.processes = accelerator.num_processes
        self.folder = Path(args.output_dir)
        self.global_step = 0
        self.deadline = time.monotonic() + 60 * args.max_train_minutes if args.max_train_minutes else math.inf
        self.interrupted = False
        module.to(accelerator.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(module, args.weight_decay), lr=args.learning_rate, betas=(0.9, 0.98), fused=True
        )
        extra = {"num_decay_steps": args.num_decay_steps or total // 5}
        schedule = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer,
            total // 10 if args.num_warmup_steps is None else args.num_warmup_steps,
            total,
            extra if args.lr_scheduler_type == "warmup_stable_decay" else None,
        )
        self.learning_rate = lambda step: args.learning_rate * schedule.lr_lambdas[0](step)

    def _start(self):
        """Continue the run that is asked for, or make sure that none is written over."""
        if self.args.resume_from_checkpoint:
            self._restore(self.args.resume_from_checkpoint)
        elif (self.folder / "checkpoint").exists():
            raise ValueError(
                f"{self.folder} holds the training state of an earlier run; go on with it (--resume_from_checkpoint "
                f"{self.folder}) or choose another --output_dir"
            )
        if self.accelerator.is_main_process:
            self._cut_log()

    @contextlib.contextmanager
    def _catching_signals(self):
        """Ctrl-C and SIGTERM end the step under way first; a progress bar over the steps stands meanwhile."""
        previous = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        main = self.accelerator.is_main_process
        self.bar = tqdm(total=self.total, initial=self.global_step, disable=not main, mininterval=bar_interval())
        try:
            yield
        finally:
            self.bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _interrupt(self, number, frame):
        self.interrupted = True

    def _must_stop(self, step):
        stop = self.interrupted or time.monotonic() > self.deadline
        if self.processes == 1:
            return stop
        if step % STOP_EVERY:
            return False
        return self.accelerator.reduce(torch.tensor(float(stop), device=self.accelerator.device)).item() > 0

    def _begin_step(self):
        """One seed a step makes augmentation, masks and dropout the same after a resume."""
        torch.manual_seed((self.args.seed * 1_000_003 + self.global_step) * 4096 + self.accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.global_step)

    def _check_finite(self, loss):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.global_step}; lower --learning_rate or raise "
                f"--num_warmup_steps and resume from the last saved state"
            )

    def _position(self):
        return {"global_step": self.global_step}

    def _cut_log(self):
        """Leave out what a run that was killed wrote after its last state."""
        path = self.folder / "train_log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if json.loads(line)["global_step"] <= self.global_step))

    def _write(self, event, record):
        """One line of train_log.jsonl, of the tracker and of the terminal."""
        record = {k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}
        if self.args.with_tracking:
            numbers = {f"{event}/{k}": v for k, v in record.items() if isinstance(v, (int, float))}
            self.accelerator.log(numbers, step=self.global_step)
        if self.accelerator.is_main_process:
            line = {"event": event, **self._position(), **record}
            with open(self.folder / "train_log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            tqdm.write(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()))
            sys.stdout.flush()

    def _exact_arguments(self):
        return {key: getattr(self.args, key) for key in self.EXACT} | {"num_processes": self.processes}

    def _save(self):
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            tensors = gather_tensors(self.module, self.ema, self.optimizer)
            save_state(self.folder / "checkpoint", tensors, {**self._position(), "arguments": self._exact_arguments()})
        self.accelerator.wait_for_everyone()

    def _restore(self, folder):
        """Load weights, moments and the number of steps. Returns the saved state's JSON."""
        parts, state = load_state(folder)
        restore_tensors(parts, find_state(folder), self.module, self.ema, self.optimizer, state["global_step"])
        self.global_step = state["global_step"]
        now = self._exact_arguments()
        for key, value in state["arguments"].items():
            if now.get(key) != value and self.accelerator.is_main_process:
                tqdm.write(f"resume: {key} was {value!r} and is now {now.get(key)!r}; not an exact continuation")
        return state
