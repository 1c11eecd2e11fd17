# SPDX-License-Identifier: Apache-2.0
"""Raw text for language modelling: from files or a Hub dataset, with whole documents held out."""

from pathlib import Path

import numpy as np
from tasks.text_files import read_dataset, read_texts, tell_problems, texts_of


def add_corpus_arguments(group):
    add = group.add_argument
    add("--train_file", nargs="+", help="text files, folders, tar archives, JSON lines or CSV, also .xz or .gz")
    add("--validation_file", nargs="+")
    add("--dataset_name", help="Hub id, or a folder that `datasets` loads")
    add("--dataset_config_name")
    add("--eval_split", default="validation", help="split of --dataset_name that is evaluated")
    add("--text_column", help="of JSON lines, CSV and datasets (default: text, facts or document, what there is)")
    add("--validation_split_percentage", type=int, default=10, help="of the training documents, where none are given")


def check_data_arguments(args, parser):
    """What all text scripts ask of their arguments; sets the default of args.output_dir."""
    if args.do_train and not args.output_dir:
        parser.error("--do_train needs an --output_dir")
    if not args.dataset_name and not (args.train_file if args.do_train else args.validation_file):
        parser.error(f"give --dataset_name or --{'train' if args.do_train else 'validation'}_file")
    if args.dataset_name and (args.train_file or args.validation_file):
        parser.error("--dataset_name and --train_file or --validation_file exclude each other")
    if not 0 < args.validation_split_percentage < 100:
        parser.error("--validation_split_percentage must lie between 0 and 100")
    if min(*args.max_length, args.max_batch_tokens, args.logging_steps) < 1:
        parser.error("--max_length, --max_batch_tokens and --logging_steps must be at least 1")
    if args.push_to_hub and (not args.hub_model_id or len(args.max_length) * len(args.seed) > 1):
        parser.error("--push_to_hub needs a --hub_model_id, one --max_length and one --seed")
    if not args.output_dir:
        args.output_dir = str(Path(__file__).parents[1] / "results" / Path(args.model_name_or_path).name)


def _split_of(args, split):
    """[(place, text)] of a split of --dataset_name and its problems; None where there is no such split."""
    rows = read_dataset(args.dataset_name, args.dataset_config_name, split)
    return None if rows is None else (texts_of(rows, args.text_column), rows.problems)


def load_corpus(args, accelerator):
    """(training, validation) documents, [(name, text)] each; the former is empty without --do_train.

    Held out are whole documents, the same ones whatever the training's seed."""
    if args.dataset_name:
        train = _split_of(args, "train") if args.do_train else ([], [])
        validation = _split_of(args, args.eval_split)
        if train is None or (validation is None and not (args.do_train and args.eval_split == "validation")):
            missing = "train" if train is None else args.eval_split
            raise ValueError(f"{args.dataset_name} has no split {missing!r}; --eval_split names the one to evaluate")
    else:
        train = read_texts(args.train_file, args.text_column) if args.do_train else ([], [])
        validation = read_texts(args.validation_file, args.text_column) if args.validation_file else None
    (train, problems), (validation, more) = train, validation or (None, [])
    if validation is None:
        if len(train) < 2:
            raise ValueError("the training text is one document, of which none can be held out; give --validation_file")
        order = np.random.default_rng(0).permutation(len(train))
        cut = max(1, len(train) - max(1, round(args.validation_split_percentage / 100 * len(train))))
        train, validation = [[train[place] for place in sorted(part)] for part in (order[:cut], order[cut:])]
    if accelerator.is_main_process:
        tell_problems(problems + more)
        accelerator.print(f"{len(train):,} documents to train on, {len(validation):,} held out")
    return train, validation
