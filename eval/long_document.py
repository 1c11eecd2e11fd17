# SPDX-License-Identifier: Apache-2.0
"""Long documents: fine-tune and evaluate a BERT on classification, at one input length or a sweep over several.

Multi-label where the labels are lists (JSON lines such as {"facts": ["...", "..."], "violated": ["6", "13"]}),
single-label where each is one name or number (JSON lines, CSV):
    accelerate launch eval/long_document.py --do_train --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --train_file train.csv --text_column text --label_column label --output_dir runs/mine
A data set of the Hub, every length from 512 to 16K, three seeds, stop after 9 minutes, go on later:
    accelerate launch eval/long_document.py --do_train --model_name_or_path model_cards/bert-mini-16k-flash \\
        --dataset_name lex_glue --dataset_config_name ecthr_a --max_length 512,1024,2048,4096,8192,16384 --seed 0,1,2 \\
        --unpad --output_dir runs/ecthr --max_train_minutes 9
    (the same command) --resume_from_checkpoint runs/ecthr
Evaluate:
    python eval/long_document.py --model_name_or_path runs/mine --validation_file test.csv
Every length gets the same documents, steps and seeds. Micro-F1 is what counts; its decision threshold is tuned on a
part of the training data that is held out, never on the validation data. The last line of stdout is one JSON object.
"""

import argparse
import time
from pathlib import Path

from tasks.document_runs import DocumentRuns, document_f1
from tasks.documents import load_documents, read_documents
from tasks.script import (
    add_training_arguments,
    explain_mistakes,
    finish,
    make_accelerator,
    start_trackers,
    writable_folder,
)
from tasks.sweep import compare, format_table, number_list, plan_runs, run_all
from tasks.text_corpus import check_data_arguments
from tasks.text_figures import draw_by_length
from tasks.text_model import add_model_arguments


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="BERT checkpoint with its tokenizer: folder or Hub id")
    add("--output_dir", help="where everything is written (default for evaluation: eval/results/<model>)")
    add("--max_length", type=number_list, default=[512], help="tokens of a document, or several: 512,1024,...")
    add("--seed", type=number_list, default=[0], help="of new weights, order and dropout, or several: 0,1,2")
    add("--max_batch_tokens", type=int, default=16_384, help="in memory at once, padding included; changes speed alone")
    add("--unpad", action="store_true", help="pack documents one behind the other: no computation on padding")
    add_model_arguments(add)
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--train_file", help="JSON lines, JSON or CSV, also .xz or .gz")
    add("--validation_file")
    add("--dataset_name", help="Hub id, or a folder that `datasets` loads")
    add("--dataset_config_name")
    add("--eval_split", default="validation", help="split of --dataset_name that is evaluated")
    add("--text_column", help="text, or list of paragraphs (default: text, facts or document, what there is)")
    add("--label_column", help="one label, or list of labels (default: label, labels, violated or articles)")
    add("--validation_split_percentage", type=int, default=20, help="of the training data, where none is given")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--do_train", action="store_true")
    add("--per_device_train_batch_size", type=int, default=8, help="documents a step and device")
    add("--num_train_epochs", type=float, default=5)
    add("--max_train_steps", type=int, help="instead of epochs")
    add("--dropout", type=float, help="of hidden states and head in training (default: the model's)")
    add("--threshold_split", type=float, default=0.1, help="share of multi-label training data for the threshold")
    add_training_arguments(
        group,
        learning_rate=5e-5,
        num_warmup_steps=None,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        logging_steps=20,
        checkpointing_steps=500,
    )
    args = parser.parse_args(argv)
    check_data_arguments(args, parser)
    if min(args.max_length) < 8 or args.per_device_train_batch_size < 1:
        parser.error("--max_length must be at least 8, --per_device_train_batch_size at least 1")
    if not 0 < args.threshold_split < 1 or not 0 <= (args.dropout or 0) < 1:
        parser.error("--threshold_split must lie between 0 and 1, --dropout from 0 to below 1")
    if args.unpad and args.attn_implementation != "io_aware":
        parser.error(f"--unpad needs --attn_implementation io_aware: {args.attn_implementation} would mix documents")
    return args


def load_data(args):
    """(training documents or None, validation documents)."""
    columns = args.text_column, args.label_column
    train = validation = None
    if args.dataset_name:
        source = args.dataset_name, args.dataset_config_name
        train = load_documents(*source, "train", *columns) if args.do_train else None
        validation = load_documents(*source, args.eval_split, *columns)
        if validation is None and (train is None or args.eval_split != "validation"):
            raise ValueError(f"{args.dataset_name} has no split {args.eval_split!r}; name one with --eval_split")
    else:
        train = read_documents(args.train_file, *columns) if args.do_train else None
        validation = read_documents(args.validation_file, *columns) if args.validation_file else None
    if validation is None:
        train, validation = train.split(args.validation_split_percentage / 100)
        validation.source = f"{validation.source}, {args.validation_split_percentage}% held out"
    if train is not None and train.multi_label != validation.multi_label:
        raise ValueError(f"{train.source} and {validation.source}: one has lists of labels, the other single labels")
    return train, validation


def summarize(runs, args):
    """Print the table of a sweep and write it, with its figure, into the output folder. Returns the rows."""
    points = compare(runs, "predictions_eval.npz", document_f1)
    rows = []
    for point in points:
        macro = [result["macro_f1"] for result in point.results]
        row = {
            "length": point.length,
            "micro-F1": f"{100 * point.value:.1f}",
            "95% interval": point.interval(".1f", 100),
            "gain": f"{100 * point.gain:+.1f} ({point.interval('+.1f', 100, gain=True)})",
            "macro-F1": f"{100 * sum(macro) / len(macro):.1f}",
            "each seed's micro-F1": " ".join(f"{100 * result['micro_f1']:.1f}" for result in point.results),
        }
        if args.do_train:
            row["training, tokens/s"] = point.mean("train_tokens_per_second", ",.0f")
        row["peak memory, MiB"] = point.mean("peak_memory_mib", ",.0f")
        rows.append(row)
    text = format_table(rows)
    print(text)
    Path(args.output_dir, "f1_by_length.md").write_text(text + "\n")
    micro = [point.value for point in points], [point.ci95 for point in points]
    macro = [sum(result["macro_f1"] for result in point.results) / len(point.results) for point in points], None
    pattern = f", {args.block_sparse}" if args.block_sparse else ""
    title = f"{Path(args.model_name_or_path).name} on {runs[0].result['source']}{pattern}"
    lengths, path = [point.length for point in points], Path(args.output_dir, "f1_by_length.png")
    draw_by_length(lengths, {"micro-F1": micro, "macro-F1": macro}, "F1", path, title)
    return rows


def main(argv=None):
    started = time.monotonic()
    args = parse_args(argv)
    writable_folder(args.output_dir)
    accelerator = make_accelerator(args)
    start_trackers(args, accelerator, "long_document")
    with explain_mistakes("long_document.py"):
        runs = plan_runs(args)
        documents = DocumentRuns(args, accelerator, *load_data(args))
        finished = run_all(runs, args, started, documents.run, accelerator.is_main_process)
        several = finished and len(runs) > 1 and accelerator.is_main_process
        table = summarize(runs, args) if several else None
    report = {"task": "long-document", "model": args.model_name_or_path if not args.do_train else args.output_dir}
    if args.do_train:
        report["training"] = {"finished": finished, "start": args.model_name_or_path}
    report["block_sparse"], report["attn_implementation"] = args.block_sparse, args.attn_implementation
    report["results"] = {run.name: run.result for run in runs if run.result is not None}
    if table:
        report["table"] = table
    return finish(report, args, accelerator, started)


if __name__ == "__main__":
    main()
