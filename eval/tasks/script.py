# SPDX-License-Identifier: Apache-2.0
"""How the scripts begin and end: arguments of every training, the output folder, the accelerator, the report."""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from tasks.training_loop import SCHEDULES


def add_training_arguments(
    group, learning_rate, num_warmup_steps, weight_decay, lr_scheduler_type, logging_steps, checkpointing_steps=None
):
    """The arguments that `tasks.training_loop` and `publish` read, with the defaults of a task."""
    add = group.add_argument
    add("--learning_rate", type=float, default=learning_rate)
    add("--weight_decay", type=float, default=weight_decay)
    add("--lr_scheduler_type", choices=SCHEDULES, default=lr_scheduler_type)
    warmup = "a tenth of all" if num_warmup_steps is None else num_warmup_steps
    add("--num_warmup_steps", type=int, default=num_warmup_steps, help=f"(default: {warmup})")
    add("--num_decay_steps", type=int, help="of warmup_stable_decay (default: a fifth of all steps)")
    add("--max_grad_norm", type=float, default=1.0)
    add("--max_train_minutes", type=float, help="stop this long after the start and save the state")
    add("--resume_from_checkpoint", help="output folder (or its checkpoint folder) of an earlier run: continue exactly")
    add("--logging_steps", type=int, default=logging_steps)
    add("--checkpointing_steps", type=int, default=checkpointing_steps, help="also save the state every so many steps")
    add("--with_tracking", action="store_true")
    add("--report_to", default="tensorboard")
    add("--push_to_hub", action="store_true")
    add("--hub_model_id")
    add("--hub_token")


def writable_folder(path):
    """Create it; raises SystemExit where that is refused."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"cannot create --output_dir {path}: {error}") from None
    if not os.access(path, os.W_OK):
        raise SystemExit(f"cannot write into --output_dir {path}; choose another or change its permissions")


def make_accelerator(args, gradient_accumulation_steps=1):
    """bf16 where there is a GPU, float32 on a CPU."""
    on_cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "") not in ("1", "true", "yes")
    return Accelerator(
        mixed_precision="bf16" if on_cuda else "no",
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
    )


@contextlib.contextmanager
def explain_mistakes(script):
    """Where a wrong argument, file or learning rate raises, end with the message alone: a traceback would hide it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"{script}: out of memory ({error}); lower the batch size or --max_batch_tokens, or take shorter inputs, "
            "--gradient_checkpointing or a --block_sparse pattern where the script has them"
        ) from None
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"{script}: {error}") from None


def start_trackers(args, accelerator, name):
    if args.with_tracking:
        plain = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str)) and k != "hub_token"}
        accelerator.init_trackers(name, config=plain)


def begin_run(accelerator, seed):
    """Before each of several trainings: free what the one before held, seed, and let the memory's peak begin here.

    A process on a CPU cannot forget its peak."""
    accelerator.free_memory()
    set_seed(seed)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)


def peak_memory_mib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def compute_metric(name, function, **inputs):
    """metrics/<name>.py through `evaluate`, or `function`, the same arithmetic, where that is not installed."""
    try:
        import evaluate
    except ImportError:
        return function(**inputs)
    return evaluate.load(str(Path(__file__).parents[1] / "metrics" / f"{name}.py")).compute(**inputs)


def publish(args, accelerator, model, tokenizer=None):
    """Save what was trained into the output folder and, with --push_to_hub, on the Hub."""
    if not accelerator.is_main_process:
        return
    for part in (model, tokenizer):
        if part is not None:
            part.save_pretrained(args.output_dir)
            if args.push_to_hub:
                part.push_to_hub(args.hub_model_id, token=args.hub_token)


def finish(report, args, accelerator, started):
    """Add the conditions to `report`, write it as all_results.json and print it as the last line of stdout.

    started: time.monotonic() at the start of the script."""
    report["device"] = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"
    report["num_processes"] = accelerator.num_processes
    report["dtype"] = {"bf16": "bfloat16"}.get(accelerator.mixed_precision, "float32")
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    report["peak_memory_mib"] = round(peak_memory_mib(accelerator.device))
    report["seconds"] = round(time.monotonic() - started, 1)
    if accelerator.is_main_process:
        (Path(args.output_dir) / "all_results.json").write_text(json.dumps(report, indent=1) + "\n")
    accelerator.end_training()
    if accelerator.is_main_process:
        sys.stderr.flush()
        print(json.dumps(report), flush=True)
    return report
