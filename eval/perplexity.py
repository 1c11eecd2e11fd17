# SPDX-License-Identifier: Apache-2.0
"""Language modelling: the perplexity of a GPT-2 at one context length or a sweep over several, on held-out documents.

Train a new model at each context length, on the same tokens in the same order, stop after 9 minutes, go on later:
    accelerate launch --mixed_precision bf16 eval/perplexity.py --do_train --config_name gpt2.json --vocab_size 8192 \\
        --train_file books.tar.xz --max_length 1024,2048,4096,8192 --output_dir runs/books --max_train_minutes 9
    (the same command) --resume_from_checkpoint runs/books
Fine-tune one, longer than it was:
    accelerate launch eval/perplexity.py --do_train --model_name_or_path gpt2 --max_length 4096 \\
        --train_file books/ --validation_file other_books/ --output_dir runs/gpt2-4k
Evaluate one model with more and less context, on files or a data set of the Hub:
    python eval/perplexity.py --model_name_or_path runs/books/8192 --max_length 1024,8192 --validation_file book.txt
Text comes from .txt files, folders and tar archives of them, JSON lines and CSV (also .xz and .gz); whole documents are
held out. Every token of the validation text is scored once, with a sliding window, at every context length. The last
line of stdout is one JSON object.
"""

import argparse
import time
from pathlib import Path

from tasks.context_runs import ContextRuns, unit_perplexity
from tasks.script import (
    add_training_arguments,
    explain_mistakes,
    finish,
    make_accelerator,
    start_trackers,
    writable_folder,
)
from tasks.sweep import compare, format_table, number_list, plan_runs, run_all
from tasks.text_corpus import add_corpus_arguments, check_data_arguments
from tasks.text_figures import draw_by_length
from tasks.text_model import (
    add_language_model_arguments,
    add_model_arguments,
    check_language_model_arguments,
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_language_model_arguments(add, "GPT-2", "byte-pair")
    add("--max_length", type=number_list, default=[1024], help="tokens of context, or several: 1024,2048,...")
    add("--seed", type=number_list, default=[0], help="of new weights, order and dropout, or several: 0,1,2")
    add("--stride", type=int, default=512, help="tokens that a window scores; the smaller, the more context and time")
    add("--max_batch_tokens", type=int, default=16_384, help="in memory at once; changes speed alone")
    add_model_arguments(add)
    add_corpus_arguments(parser.add_argument_group("data"))
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--do_train", action="store_true")
    add("--tokens_per_step", type=int, default=65_536, help="over all processes")
    add("--num_train_epochs", type=float, default=1)
    add("--max_train_steps", type=int, help="instead of epochs")
    add("--short_steps", type=int, default=0, help="first steps in rows of the shortest --max_length, at every length")
    add_training_arguments(
        group,
        learning_rate=1e-3,
        num_warmup_steps=None,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        logging_steps=20,
        checkpointing_steps=500,
    )
    args = parser.parse_args(argv)
    check_language_model_arguments(args, parser)
    check_data_arguments(args, parser)
    if args.do_train and (args.tokens_per_step < 1 or args.tokens_per_step % max(args.max_length)):
        parser.error(f"--tokens_per_step must be a multiple of the longest --max_length, {max(args.max_length)}")
    if not 1 <= args.stride <= min(args.max_length):
        parser.error(f"--stride must be 1 to the shortest context, {min(args.max_length)} tokens; got {args.stride}")
    return args


def summarize(runs, args):
    """Print the table of a sweep and write it, with its figure, into the output folder. Returns the rows."""
    points, rows = compare(runs, "predictions_nll.npz", unit_perplexity), []
    for point in points:
        row = {
            "context": point.length,
            "perplexity": f"{point.value:.2f}",
            "95% interval": point.interval(".2f"),
            "change": f"{point.gain:+.2f} ({point.interval('+.2f', gain=True)})",
            "bits per byte": point.mean("bits_per_byte", ".3f"),
            "tokens scored": point.mean("num_samples", ",.0f"),
        }
        if args.do_train:
            row["training tokens"] = point.mean("train_tokens", ",.0f")
            row["training, tokens/s"] = point.mean("train_tokens_per_second", ",.0f")
        rows.append(row)
    text = format_table(rows)
    print(text)
    Path(args.output_dir, "perplexity_by_context.md").write_text(text + "\n")
    series = {"perplexity": ([point.value for point in points], [point.ci95 for point in points])}
    path = Path(args.output_dir, "perplexity_by_context.png")
    draw_by_length([point.length for point in points], series, "perplexity", path, runs[0].result["source"][:80])
    return rows


def main(argv=None):
    started = time.monotonic()
    args = parse_args(argv)
    writable_folder(args.output_dir)
    accelerator = make_accelerator(args)
    start_trackers(args, accelerator, "perplexity")
    with explain_mistakes("perplexity.py"):
        runs = plan_runs(args)
        finished = run_all(runs, args, started, ContextRuns(args, accelerator).run, accelerator.is_main_process)
        several = finished and len(runs) > 1 and accelerator.is_main_process
        table = summarize(runs, args) if several else None
    report = {"task": "language-modelling", "model": args.output_dir if args.do_train else args.model_name_or_path}
    if args.do_train:
        report["training"] = {"finished": finished, "start": args.model_name_or_path or args.config_name}
    report["results"] = {run.name: run.result for run in runs if run.result is not None}
    if table:
        report["table"] = table
    return finish(report, args, accelerator, started)


if __name__ == "__main__":
    main()
