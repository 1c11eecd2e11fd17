# SPDX-License-Identifier: Apache-2.0
"""Long Range Arena (arXiv 2011.04006): train, score and time BERT classifiers with exact, sparse and other attentions.

Five tasks, one token for each byte, pixel or word: listops (2K) and pathfinder (1K) are made here and need no data;
text (IMDB, 4K) and image (CIFAR-10, grey, 1K) come from the Hub or from files, retrieval (AAN, pairs of 4K) from files.
    accelerate launch eval/lra.py --task listops --do_train --output_dir runs/listops --max_train_minutes 9
    (the same command) --resume_from_checkpoint runs/listops
    accelerate launch eval/lra.py --task retrieval --do_train --output_dir runs/aan \\
        --train_file new_aan_pairs.train.tsv --validation_file new_aan_pairs.test.tsv
Files: the benchmark's own .tsv, JSON lines or CSV with the columns Source and Target (listops), text and label, or
text1, text2 and label; images as npz with uint8 `images` (n, 32, 32) and `labels`, or CIFAR-10's data_batch_*.bin.
Evaluate, also a Pathfinder-32 model of eval/pathx.py:
    python eval/lra.py --task pathfinder --model_name_or_path runs/pathfinder-32
Time a training step of every attention at the lengths of the five tasks, in one run; CSV and figure to eval/results:
    python eval/lra.py --speed
The last line of stdout is one JSON object.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from metrics.accuracy import accuracy_with_interval
from tasks import lra_speed
from tasks.document_model import ClassifierLoss, score_documents
from tasks.lra_data import SequenceBatches, class_names, encode, load_split, read_files, targets_of
from tasks.lra_model import ATTENTIONS, create_model, load_model, new_config
from tasks.lra_tasks import TASKS
from tasks.script import (
    add_training_arguments,
    compute_metric,
    explain_mistakes,
    finish,
    make_accelerator,
    publish,
    start_trackers,
    writable_folder,
)
from tasks.text_files import tell_problems
from tasks.text_model import parse_block_sparse
from tasks.text_training import TextTrainer

EXACT = (
    *("task", "attention", "block_sparse", "position_embedding_type", "max_length", "dropout", "num_train_samples"),
    *("per_device_train_batch_size", "train_file", "dataset_name", "dataset_config_name", "hidden_size"),
    *("num_hidden_layers", "num_attention_heads", "intermediate_size"),
)
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", nargs="+", choices=TASKS, default=list(TASKS), help="one, or for --speed several (default: all)")
    add(
        "--attention", nargs="+", choices=ATTENTIONS, help="one (default: flash), or for --speed several (default: all)"
    )
    add("--block_sparse", help='of block_sparse (default: {"pattern": "butterfly", "block_size": 64})')
    add("--model_name_or_path", help="checkpoint to evaluate: folder or Hub id")
    add("--output_dir", help="where everything is written (default without training: eval/results, in it <model>)")
    add("--seed", type=int, default=0, help="of new weights, order and dropout")
    group = parser.add_argument_group("speed")
    add = group.add_argument
    add("--speed", action="store_true", help="time training steps")
    add("--torch_compile", action=argparse.BooleanOptionalAction, default=True, help="on CUDA also compiled layers")
    add("--quick", action="store_true", help="few repetitions, on a CPU 256 tokens")
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--train_file", nargs="+")
    add("--validation_file", nargs="+", help="what is evaluated")
    add("--dataset_name", help="of the Hub, or a folder that `datasets` loads (default for text and image: the task's)")
    add("--dataset_config_name")
    add("--eval_split", default="test", help="that is evaluated where no file is given")
    add("--num_train_samples", type=int, help="of listops (default: 96000) and pathfinder (default: 160000)")
    add("--num_eval_samples", type=int, help="of listops (default: 2000) and pathfinder (default: 20000)")
    add("--data_cache_dir", help="keep the examples that are made here in this folder")
    add("--num_workers", type=int, help="processes that make them (default: CPU cores)")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--do_train", action="store_true")
    add("--per_device_train_batch_size", type=int, help="examples a step and device (default: the task's)")
    add("--max_train_steps", type=int, help="(default: the task's)")
    add("--max_batch_tokens", type=int, default=131_072, help="in memory at once; changes speed alone")
    add("--max_length", type=int, help="tokens, [CLS] included (default: the task's)")
    add("--position_embedding_type", choices=("absolute", "rotary"), default="absolute")
    add("--dropout", type=float, default=0.1, help="of hidden states and attention")
    for name in SIZES:
        add(f"--{name}", type=int, help="(default: the task's)")
    add_training_arguments(
        group,
        learning_rate=3e-4,
        num_warmup_steps=None,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        logging_steps=50,
        checkpointing_steps=1000,
    )
    args = parser.parse_args(argv)
    args.attention = args.attention or (list(ATTENTIONS) if args.speed else ["flash"])
    if not args.speed and (args.do_train == bool(args.model_name_or_path)):
        parser.error("give one of --do_train, --model_name_or_path to evaluate, and --speed")
    if not args.speed and len(args.task) + len(args.attention) > 2:
        parser.error("give one --task and one --attention; several are for --speed")
    if args.do_train and not args.output_dir:
        parser.error("--do_train needs an --output_dir")
    if args.do_train and bool(args.train_file) != bool(args.validation_file):
        parser.error("give both of --train_file and --validation_file, or none")
    if args.dataset_name and args.validation_file:
        parser.error("--dataset_name and files exclude each other")
    named = [args.per_device_train_batch_size, args.max_train_steps, args.max_batch_tokens, args.logging_steps]
    named += [args.num_train_samples, args.num_eval_samples, *(getattr(args, name) for name in SIZES)]
    if min(number for number in named if number is not None) < 1 or (args.max_length or 8) < 8:
        parser.error("numbers of examples, steps and tokens and sizes must be at least 1, --max_length at least 8")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout must lie from 0 to below 1, got {args.dropout}")
    if args.push_to_hub and not args.hub_model_id:
        parser.error("--push_to_hub needs a --hub_model_id")
    if not args.output_dir:
        results = Path(__file__).parent / "results"
        args.output_dir = str(results if args.speed else results / Path(args.model_name_or_path).name)
    return args


def load(args, split, files, accelerator):
    """Examples of a split or of files; the first process of a machine makes and caches them."""
    with accelerator.local_main_process_first():
        if files:
            examples = read_files(args.task, files)
        else:
            if args.task not in ("listops", "pathfinder") and not (args.dataset_name or TASKS[args.task].dataset):
                raise ValueError(f"{args.task} needs --validation_file, for a training --train_file, or --dataset_name")
            examples = load_split(args.task, split, args, accelerator.is_local_main_process)
    if accelerator.is_main_process:
        tell_problems(examples.problems)
        print(f"{examples.source}: {len(examples):,} examples", flush=True)
    return examples


def batches_of(examples, model, args):
    sequences, targets = encode(examples, model.config), targets_of(args.task, examples, model.config)
    unpad = ATTENTIONS[getattr(model.config, "lra_attention", "flash")] == "io_aware"
    return SequenceBatches(
        sequences, targets, args.per_device_train_batch_size, args.max_batch_tokens, unpad, args.seed
    )


def train(args, accelerator):
    """(model, facts about its training)."""
    task, examples = TASKS[args.task], load(args, "train", args.train_file, accelerator)
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name)}
    pattern, names = parse_block_sparse(args.block_sparse), class_names(args.task, examples)
    shape = args.max_length, args.dropout, args.position_embedding_type, pattern
    fuse = ATTENTIONS[args.attention] == "io_aware"
    model = create_model(new_config(args.task, args.attention, names, *shape, fuse=fuse, **sizes))
    steps = args.max_train_steps or task.num_steps
    trainer = TextTrainer(args, accelerator, ClassifierLoss(model), steps, batches_of(examples, model, args), EXACT)
    finished = trainer.run()
    facts = {"finished": finished, "steps": trainer.global_step, "of": steps, "tokens_per_second": trainer.speed}
    if finished:
        model.to(torch.bfloat16)
        publish(args, accelerator, model)
        model.float()  # what is saved is what is scored
    return model, facts | {"parameters": model.num_parameters()}


def evaluate(model, examples, args, accelerator):
    """Accuracy with its interval; writes predictions_eval.npz."""
    batches = batches_of(examples, model, args)
    module = ClassifierLoss(model.to(accelerator.device))
    begun = time.monotonic()
    scores = score_documents(module, batches, accelerator, args.task)
    seconds = time.monotonic() - begun
    given = {"predictions": scores.argmax(1), "references": batches.targets}
    if not accelerator.is_main_process:
        return None
    np.savez_compressed(Path(args.output_dir) / "predictions_eval.npz", scores=scores.astype(np.float16), **given)
    return {
        "source": examples.source,
        **compute_metric("accuracy", accuracy_with_interval, **given),
        "largest_class": np.bincount(batches.targets).max() / len(examples),  # what a constant answer scores
        "left_out": len(examples.problems),
        "examples_per_second": len(examples) / seconds,
    }


def main(argv=None):
    started = time.monotonic()
    args = parse_args(argv)
    writable_folder(args.output_dir)
    if args.speed:
        with explain_mistakes("lra.py"):
            args.block_sparse = parse_block_sparse(args.block_sparse)
            report = lra_speed.run(args, make_accelerator(args).device)
        print(json.dumps(report), flush=True)
        return report
    (args.task,), (args.attention,) = args.task, args.attention
    accelerator = make_accelerator(args)
    set_seed(args.seed)
    start_trackers(args, accelerator, "lra")
    with explain_mistakes("lra.py"):
        args.per_device_train_batch_size = args.per_device_train_batch_size or TASKS[args.task].train_batch_size
        report = {"task": f"lra-{args.task}", "model": args.model_name_or_path or args.output_dir}
        examples = load(args, args.eval_split, args.validation_file, accelerator)
        if args.do_train:
            model, report["training"] = train(args, accelerator)
        else:
            model = load_model(args.model_name_or_path)
        report["attention"] = getattr(model.config, "lra_attention", "flash")
        report["block_sparse"] = model.config.block_sparse
        if not args.do_train or report["training"]["finished"]:
            report["results"] = evaluate(model, examples, args, accelerator)
    return finish(report, args, accelerator, started)


if __name__ == "__main__":
    main()
