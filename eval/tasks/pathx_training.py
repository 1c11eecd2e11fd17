# SPDX-License-Identifier: Apache-2.0
"""Training of the Path-X and Path-256 classifiers: curriculum, losses, EMA weights, exact resume, clean stop."""

import copy
import time

import torch
from metrics.accuracy import wilson_interval
from tasks.pathfinder import generate_batch, split_seed
from tasks.pathx_curriculum import Chunks, ImageSource
from tasks.pathx_evaluation import predict
from tasks.pathx_model import PathTracer, augment, check_fits, compile_layers, prepare_batch
from tasks.pathx_pretraining import PixelReader, hide_pixels
from tasks.training_loop import TrainingLoop


def curve_layers(text, num_layers):
    """Layers (1-based) whose output the curve loss reads: "half" = from the middle on, "last", or "4,6,8"."""
    if text in ("half", "last"):
        return list(range(num_layers // 2 if text == "half" else num_layers, num_layers + 1))
    try:
        layers = sorted({int(layer) for layer in text.split(",")})
    except ValueError:
        layers = [0]
    if not 1 <= layers[0] <= layers[-1] <= num_layers:
        raise ValueError(f"--curve_loss_layers {text!r}: give half, last, or layers 1 to {num_layers} such as 4,6,8")
    return layers


class Trainer(TrainingLoop):
    """args: the namespace of pathx.py. `run` returns True when the curriculum is complete, False when it was stopped
    earlier (time limit or signal); the state is saved in both cases. `ema` is then the model to keep."""

    EXACT = (
        *("curriculum", "seed", "rendering", "data_echo", "contrast_jitter", "gradient_accumulation_steps"),
        *("per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "num_warmup_steps", "num_decay_steps"),
        *("weight_decay", "max_grad_norm", "ema_decay", "curve_loss_weight", "curve_loss_weight_end"),
        *("curve_loss_layers", "masked_pixels", "image_size"),
    )

    def __init__(self, args, accelerator, model, stages):
        self.stages = stages
        for stage in stages:
            check_fits(model.config, stage.size)
        self.config = model.config
        ema = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
        layers = curve_layers(args.curve_loss_layers, self.config.num_hidden_layers) if args.curve_loss_weight else []
        self.tracer = PixelReader(model) if args.masked_pixels else PathTracer(model, layers)
        super().__init__(args, accelerator, self.tracer, sum(stage.steps for stage in stages), ema)
        self.stage = self.step = 0
        self.validation = {}
        self._start()
        if args.torch_compile and accelerator.device.type == "cuda":
            compile_layers(model)
        self.parallel, self.prepared = accelerator.prepare(self.tracer, self.optimizer)

    def run(self):
        with self._catching_signals():
            while self.stage < len(self.stages):
                finished = self._run_stage(self.stages[self.stage])
                if finished:
                    self._validate()
                    self.stage, self.step = self.stage + 1, 0
                complete = self.stage == len(self.stages)
                if complete or not finished or self._must_stop(self.step):
                    self._save()
                    return complete
            return True

    def _run_stage(self, stage):
        args, device = self.args, self.accelerator.device
        batch_size = stage.batch_size or args.per_device_train_batch_size
        if batch_size % args.data_echo:
            raise ValueError(f"batch size {batch_size} is not a multiple of --data_echo {args.data_echo}")
        micro, world = args.gradient_accumulation_steps, self.processes
        chunks = Chunks(
            stage.spec(args.image_size), batch_size // args.data_echo, args.rendering, self.stage, args.seed
        )
        chunks[0]  # compiles the generator once, before the workers are forked
        span = (self.step * micro, stage.steps * micro)
        rank = self.accelerator.process_index
        workers = args.num_workers
        batches = iter(ImageSource(chunks, batch_size, args.data_echo, *span, rank, world, workers, device))
        self.tracer.train()
        self._reset_log()
        while self.step < stage.steps:
            self._begin_step()
            progress = self.global_step / max(1, self.total - 1)
            curve_weight = args.curve_loss_weight + progress * (args.curve_loss_weight_end - args.curve_loss_weight)
            for _ in range(micro):
                with self.accelerator.accumulate(self.parallel):
                    images, trace, labels = next(batches)
                    images, trace = augment(images, trace, args.contrast_jitter)
                    if args.masked_pixels:
                        images, trace = hide_pixels(images, args.masked_pixels)
                    ids, trace = prepare_batch(images, trace, self.config)
                    label_loss, curve_loss, stats = self.parallel(ids, trace, labels)
                    self.accelerator.backward(label_loss + curve_weight * curve_loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.parallel.parameters(), args.max_grad_norm)
                    self.prepared.step()
                    self.prepared.zero_grad()
                    losses = torch.stack((label_loss.detach(), curve_loss.detach()))
                    self.sums += torch.cat((losses, stats, torch.ones_like(losses[:1])))
                    self.images += len(labels) * world
            self._update_ema()
            self.step, self.global_step = self.step + 1, self.global_step + 1
            self.bar.update()
            if self.step % args.logging_steps == 0:
                self._log(curve_weight)
            if args.eval_steps and self.step % args.eval_steps == 0 and self.step < stage.steps:
                self._validate()
            if args.checkpointing_steps and self.global_step % args.checkpointing_steps == 0:
                self._save()
            if self.step < stage.steps and self._must_stop(self.step):
                return False
        return True

    @torch.no_grad()
    def _update_ema(self):
        decay = min(self.args.ema_decay, (1 + self.global_step) / (10 + self.global_step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.tracer.model.parameters()), 1 - decay)

    def _reset_log(self):
        self.sums = torch.zeros(6, device=self.accelerator.device)
        self.images, self.since = 0, time.monotonic()

    def _log(self, curve_weight):
        sums = self.accelerator.reduce(self.sums, "sum").tolist()
        count = sums[5]
        record = {
            f"{self.tracer.reads}_loss": sums[0] / count,
            f"{self.tracer.reads}_accuracy": sums[2] / count,
            "curve_loss": sums[1] / count,
            "curve_iou": sums[3] / max(1.0, sums[4]),
            "loss": (sums[0] + curve_weight * sums[1]) / count,
            "images_per_second": self.images / (time.monotonic() - self.since),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        self._check_finite(record["loss"])
        self._write("train", record)
        self._reset_log()

    def _position(self):
        return {"stage": self.stage, "step": self.step, "global_step": self.global_step}

    def _write(self, event, record):
        super()._write(event, {"stage": self.stage + 1, **record})  # people count from 1

    def _validate(self):
        """Accuracy of the EMA weights on validation images of the stage under way."""
        args, accelerator = self.args, self.accelerator
        if not args.num_validation_samples:
            return
        stage = self.stages[self.stage]
        if self.stage not in self.validation:
            share = range(accelerator.process_index, args.num_validation_samples, accelerator.num_processes)
            seeds = [split_seed("validation", index) for index in share]
            samples = generate_batch(
                stage.spec(args.image_size), seeds, args.rendering[0], num_workers=args.num_workers
            )
            self.validation = {self.stage: samples}
        images, labels = self.validation[self.stage]
        begun = time.monotonic()
        batch = args.per_device_eval_batch_size
        chosen = predict(self.ema, torch.as_tensor(images), batch, accelerator) > 0.5
        right = (chosen == torch.as_tensor(labels).bool()).sum()
        counts = torch.stack((right, torch.tensor(len(labels)))).to(accelerator.device)
        hits, total = accelerator.reduce(counts, "sum").tolist()
        record = {"accuracy": hits / total, "ci95": [round(x, 4) for x in wilson_interval(hits, total)]}
        self._write("validation", {**record, "num_samples": total, "seconds": time.monotonic() - begun})
        self.since += time.monotonic() - begun

    def _restore(self, folder):
        state = super()._restore(folder)
        self.stage, self.step = state["stage"], state["step"]
        self.global_step = sum(stage.steps for stage in self.stages[: self.stage]) + self.step
