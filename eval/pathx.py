# SPDX-License-Identifier: Apache-2.0
"""Path-X: are the two markers of a 128 x 128 Pathfinder image on one curve? 16,384 pixels, one token each.

Evaluate (default), on a CPU, one GPU or several:
    python eval/pathx.py --model_name_or_path model_cards/pathx-16k-flash
    accelerate launch eval/pathx.py --model_name_or_path model_cards/pathx-16k-flash --num_eval_samples 20000 \\
        --rendering lra original --contour_length 14 9 6
Train through canvases of growing size, stop after 9 minutes, go on later:
    accelerate launch --num_processes 2 --mixed_precision bf16 eval/pathx.py --do_train --torch_compile \\
        --output_dir runs/pathx --max_train_minutes 9
    (the same command) --resume_from_checkpoint runs/pathx
Images come from eval/tasks/pathfinder.py, so nothing is downloaded. Training may use the generator's curve numbers as
extra supervision (--curve_loss_weight 0 turns that off), or begin with a pretraining on images alone (--masked_pixels
0.5). The last line of stdout is one JSON object.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from tasks.pathx_curriculum import CURRICULA, parse_curriculum
from tasks.pathx_evaluation import evaluate_images, image_sets
from tasks.pathx_figures import plot_log
from tasks.pathx_model import check_fits, compile_layers, create_model, load_model
from tasks.pathx_training import Trainer
from tasks.script import (
    add_training_arguments,
    explain_mistakes,
    finish,
    make_accelerator,
    publish,
    start_trackers,
    writable_folder,
)


def parse_args(argv=None, image_size=128, description=__doc__):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", help="checkpoint folder or Hub id; to train from scratch, leave out")
    add("--config_name", help="JSON of a FlashBertConfig for a new model (default: 1.6 M parameters)")
    add("--trust_remote_code", action="store_true", help="let a Hub checkpoint run its own code")
    add("--image_size", type=int, choices=CURRICULA, default=image_size, help="of the task, which sets its dashes too")
    add("--output_dir", help="where everything is written (default for evaluation: eval/results/<model>)")
    add("--seed", type=int, default=0, help="of the weights and of the training images")
    add("--num_workers", type=int, help="image generator processes (default: CPU cores per process - 1)")
    add("--rendering", nargs="+", choices=("lra", "original"), default=["lra"], help="one or both kinds of grey levels")
    add("--torch_compile", action="store_true", help="torch.compile the model on CUDA")
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--num_eval_samples", type=int, default=2000, help="0: no evaluation after training")
    add("--contour_length", type=int, nargs="+", default=[14], help="dashes of the long curves: 14 (hard), 9, 6 (easy)")
    add("--eval_split", choices=("test", "validation"), default="test")
    add("--images_file", help="npz with images uint8 (n, S, S) and labels (n,), evaluated instead of generated ones")
    add("--data_cache_dir", help="folder that keeps generated evaluation images")
    add("--per_device_eval_batch_size", type=int, default=16)
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--do_train", action="store_true")
    add(
        "--curriculum",
        help="stages size:contour_length:num_distractors:steps[:batch_size per device],... where an empty field is the "
        f"full task's (default: {CURRICULA[image_size]})",
    )
    add("--per_device_train_batch_size", type=int, default=32, help="where a stage names none")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--ema_decay", type=float, default=0.999, help="of the averaged weights that are evaluated and saved")
    add("--curve_loss_weight", type=float, default=1.0, help="of the per-pixel loss on marked curves; 0: labels only")
    add("--curve_loss_weight_end", type=float, default=0.3, help="the weight falls linearly to this")
    add("--curve_loss_layers", default="half", help="half (every layer from the middle on), last, or such as 4,6,8")
    add(
        "--masked_pixels",
        type=float,
        default=0.0,
        help="pretrain: hide this share of the pixels and learn to tell them, no labels, no curves, no scores; then "
        "train from the folder with --model_name_or_path",
    )
    add("--contrast_jitter", type=float, default=0.2, help="contrast factor 1 +- this, with the 8 symmetries")
    add("--data_echo", type=int, default=1, help="times an image is used on average, if generating is slow")
    add("--eval_steps", type=int, default=500, help="steps between short validations; also at each stage's end")
    add("--num_validation_samples", type=int, default=512)
    add_training_arguments(
        group,
        learning_rate=7e-4,
        num_warmup_steps=200,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        logging_steps=50,
    )
    args = parser.parse_args(argv)
    args.curriculum = args.curriculum or CURRICULA[args.image_size]
    if not args.do_train and not args.model_name_or_path:
        parser.error("give --model_name_or_path to evaluate, or --do_train")
    if args.do_train and not args.output_dir:
        parser.error("--do_train needs an --output_dir")
    if args.do_train and args.images_file and args.num_eval_samples == 0:
        parser.error("--images_file is for evaluation, but --num_eval_samples 0 turns evaluation off")
    if min(args.gradient_accumulation_steps, args.data_echo, args.logging_steps, args.per_device_train_batch_size) < 1:
        parser.error("batch size, accumulation, --data_echo and --logging_steps must be at least 1")
    if not 0 <= args.masked_pixels < 1:
        parser.error(f"--masked_pixels is a share, at least 0 and below 1, got {args.masked_pixels}")
    if args.masked_pixels:  # a head that is not trained has no score
        args.num_validation_samples = args.num_eval_samples = 0
    if not 0 <= args.seed < 4096:
        parser.error(f"--seed must be 0 to 4095, got {args.seed}")
    if args.push_to_hub and not args.hub_model_id:
        parser.error("--push_to_hub needs a --hub_model_id, such as your-name/pathx-16k-flash")
    if not args.output_dir:
        args.output_dir = str(Path(__file__).parent / "results" / Path(args.model_name_or_path).name)
    return args


def train(args, accelerator, model):
    """Returns (model to keep, finished). Saves the checkpoint when the curriculum is complete."""
    stages = parse_curriculum(args.curriculum)
    config, tokens = model.config, getattr(model.config, "num_global_tokens", 0) + args.image_size**2
    if getattr(config, "position_embedding_type", "absolute") != "absolute":  # no table: the config says what it is for
        config.max_position_embeddings = max(config.max_position_embeddings, tokens)
    start_trackers(args, accelerator, "pathx")
    trainer = Trainer(args, accelerator, model, stages)
    if trainer.tracer.curve_layers:
        layers = trainer.tracer.curve_layers
        accelerator.print(f"curve loss on layers {layers}; its linear heads are not part of the checkpoint")
    finished = trainer.run()
    if accelerator.is_main_process:
        plot_log(Path(args.output_dir) / "train_log.jsonl")
    if finished:
        kept = trainer.ema.to(torch.bfloat16)  # on every process, so that all evaluate what is saved
        publish(args, accelerator, kept)
    return trainer, finished


def evaluate(args, accelerator, model):
    """{set of images: its result} for all that are asked for (main process; None elsewhere)."""
    model = model.float().to(accelerator.device).eval()
    if args.torch_compile and accelerator.device.type == "cuda":
        compile_layers(model)
    results = {}
    for name, dataset, spec, source, key in image_sets(args, accelerator):
        check_fits(model.config, dataset.size)
        result = evaluate_images(model, dataset, name, spec.marker_radius, key, args, accelerator)
        results[name] = {"source": source, "size": dataset.size, **result} if result else None
    return results


def main(argv=None, image_size=128, description=__doc__):
    """`image_size`: of the task, if the arguments name none. Returns the report."""
    started = time.monotonic()
    args = parse_args(argv, image_size, description)
    writable_folder(args.output_dir)
    accelerator = make_accelerator(args, args.gradient_accumulation_steps)
    if args.num_workers is None:
        args.num_workers = max(0, len(os.sched_getaffinity(0)) // accelerator.num_processes - 1)
    set_seed(args.seed)
    with explain_mistakes(Path(sys.argv[0]).name):
        if args.model_name_or_path:
            model = load_model(args.model_name_or_path, args.trust_remote_code)
        else:
            model = create_model(args.image_size, args.config_name)
        report = {
            "task": f"pathfinder-{args.image_size}",
            "model": args.output_dir if args.do_train else args.model_name_or_path,
        }
        finished = True
        if args.do_train:
            trainer, finished = train(args, accelerator, model)
            model = trainer.ema
            report["training"] = {"finished": finished, "steps": trainer.global_step, "of": trainer.total}
        if finished and args.num_eval_samples:
            report["results"] = evaluate(args, accelerator, model)
    return finish(report, args, accelerator, started)


if __name__ == "__main__":
    main()
