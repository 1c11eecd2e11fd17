# SPDX-License-Identifier: Apache-2.0
"""Training of text models: steps made of micro-batches under a token budget, on any number of processes."""

import contextlib
import json
import time

import torch
from tasks.text_figures import draw_losses
from tasks.token_batches import to_device
from tasks.training_loop import TrainingLoop

WARM_UP = 2  # steps of a run that do not count in its speed


class TextTrainer(TrainingLoop):
    """`module(**batch)` gives the part of a micro-batch in the loss of its step, a scalar: a step's gradient is the sum
    over its micro-batches and the mean over the processes. `micro_batches(step, rank, world)` lists those of one
    process, as dicts of CPU tensors with, besides, the number `num_tokens` of tokens that are not padding.

    `run` returns True when all steps are done, False when it was stopped earlier (time limit or signal); the state is
    saved in both cases. exact: names of the script's arguments on which data and updates depend, besides those here.
    """

    EXACT = (
        *("seed", "learning_rate", "weight_decay", "lr_scheduler_type", "num_warmup_steps", "num_decay_steps"),
        "max_grad_norm",
    )

    def __init__(self, args, accelerator, module, total, micro_batches, exact):
        self.EXACT = (*TextTrainer.EXACT, *exact)
        self.micro_batches = micro_batches
        super().__init__(args, accelerator, module, total)
        self._start()
        self.parallel, self.prepared = accelerator.prepare(module, self.optimizer)
        self.all_tokens = 0  # that this process has seen since it began
        self.speed = None  # tokens per second over all processes, since they began

    def run(self):
        args, first = self.args, self.global_step
        begun = before = None
        self.module.train()
        self._reset_log()
        with self._catching_signals():
            while self.global_step < self.total:
                loss = self._step()
                self.losses += loss
                self.global_step += 1
                self.bar.update()
                if self.global_step == first + WARM_UP:
                    self._wait()
                    begun, before = time.monotonic(), self.all_tokens
                if self.global_step % args.logging_steps == 0 or self.global_step == self.total:
                    self._log()
                if self.global_step == self.total:
                    break
                if args.checkpointing_steps and self.global_step % args.checkpointing_steps == 0:
                    self._save()
                if self._must_stop(self.global_step):
                    break
            self._wait()
            if begun is not None and self.global_step > first + WARM_UP:
                mine = torch.tensor(float(self.all_tokens - before), device=self.accelerator.device)
                self.speed = self.accelerator.reduce(mine, "sum").item() / (time.monotonic() - begun)
            if self.global_step > first:
                self._save()
        if self.accelerator.is_main_process:
            self._draw()
        return self.global_step == self.total

    def _step(self):
        self._begin_step()
        batches = self.micro_batches(self.global_step, self.accelerator.process_index, self.processes)
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches, 1):
            self.all_tokens += batch.pop("num_tokens")
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.parallel):
                loss = self.parallel(**to_device(batch, self.accelerator.device))
                self.accelerator.backward(loss)
            total += loss.detach()
        self.accelerator.clip_grad_norm_(self.parallel.parameters(), self.args.max_grad_norm)
        self.prepared.step()
        self.prepared.zero_grad()
        return total

    def _wait(self):
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    def _reset_log(self):
        self.losses = torch.zeros((), device=self.accelerator.device)
        self.since = time.monotonic(), self.all_tokens, self.global_step

    def _log(self):
        begun, tokens, first = self.since
        mine = torch.stack((self.losses / self.processes, self.losses.new_tensor(self.all_tokens - tokens)))
        loss, tokens = self.accelerator.reduce(mine, "sum").tolist()
        record = {
            "loss": loss / (self.global_step - first),
            "tokens_per_second": round(tokens / (time.monotonic() - begun)),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        self._check_finite(record["loss"])
        self._write("train", record)
        self._reset_log()

    def _draw(self):
        """training.png: the loss over the steps of the whole training, from its log."""
        records = [json.loads(line) for line in (self.folder / "train_log.jsonl").read_text().splitlines()]
        points = [(record["global_step"], record["loss"]) for record in records if record["event"] == "train"]
        if points:
            draw_losses(points, self.folder / "training.png")
