# SPDX-License-Identifier: Apache-2.0
"""Pretrain a BERT for long inputs by masked language modelling, from scratch or further.

A new model with a tokenizer of its own, first on short pieces, which is cheap, then on long ones:
    accelerate launch --mixed_precision bf16 eval/pretrain_mlm.py --do_train --config_name bert.json \\
        --vocab_size 8192 --train_file books.tar.xz cases.jsonl.xz --max_length 1024 --output_dir runs/short
    accelerate launch --mixed_precision bf16 eval/pretrain_mlm.py --do_train --model_name_or_path runs/short \\
        --train_file books.tar.xz cases.jsonl.xz --max_length 16384 --output_dir runs/long --max_train_minutes 9
    (the same command) --resume_from_checkpoint runs/long
Evaluate:
    python eval/pretrain_mlm.py --model_name_or_path runs/long --validation_file book.txt --max_length 16384
Text comes from .txt files, folders and tar archives of them, JSON lines and CSV (also .xz and .gz); whole documents are
held out. Documents are packed, so nothing is computed on padding. The last line of stdout is one JSON object.
"""

import argparse
import math
import time

import numpy as np
import torch
from metrics.multilabel_f1 import bootstrap_weights, interval
from tasks.documents import tokenize
from tasks.masked_modelling import MaskedBatches, MaskedLoss, cut, score_masked
from tasks.script import (
    add_training_arguments,
    begin_run,
    explain_mistakes,
    finish,
    make_accelerator,
    peak_memory_mib,
    publish,
    start_trackers,
    writable_folder,
)
from tasks.sweep import number_list, plan_runs, run_all
from tasks.text_corpus import add_corpus_arguments, check_data_arguments, load_corpus
from tasks.text_model import (
    add_language_model_arguments,
    add_model_arguments,
    check_language_model_arguments,
    load_model,
    new_config,
)
from tasks.text_tokenizer import find_tokenizer, train_word_pieces
from tasks.text_training import TextTrainer

EXACT = ("max_length", "per_device_train_batch_size", "num_train_epochs", "max_train_steps", "mlm_probability")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_language_model_arguments(add, "BERT", "word-piece")
    add("--max_length", type=number_list, default=[512], help="tokens of a piece of a document")
    add("--seed", type=number_list, default=[0], help="of new weights, order, masks and dropout")
    add("--max_batch_tokens", type=int, default=16_384, help="in memory at once; changes speed alone")
    add("--mlm_probability", type=float, default=0.15, help="share of the tokens that is to be guessed")
    add_model_arguments(add)
    add_corpus_arguments(parser.add_argument_group("data"))
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--do_train", action="store_true")
    add("--per_device_train_batch_size", type=int, default=32, help="pieces a step and device")
    add("--num_train_epochs", type=float, default=1)
    add("--max_train_steps", type=int, help="instead of epochs")
    add_training_arguments(
        group,
        learning_rate=1e-3,
        num_warmup_steps=None,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        logging_steps=20,
        checkpointing_steps=500,
    )
    args = parser.parse_args(argv)
    check_language_model_arguments(args, parser)
    check_data_arguments(args, parser)
    if len(args.max_length) > 1 or len(args.seed) > 1:
        parser.error("--max_length and --seed take one number here")
    if args.max_length[0] < 8 or args.per_device_train_batch_size < 1 or not 0 < args.mlm_probability < 1:
        parser.error("--max_length must be at least 8, batches at least 1, --mlm_probability between 0 and 1")
    if args.attn_implementation != "io_aware":
        parser.error(f"documents are packed, which --attn_implementation {args.attn_implementation} would mix")
    return args


class PretrainingRun:
    """The text, the tokenizer and one run: train, score."""

    def __init__(self, args, accelerator):
        self.args, self.accelerator = args, accelerator
        train, validation = load_corpus(args, accelerator)
        self.tokenizer = find_tokenizer(args, accelerator, [text for _, text in train], train_word_pieces)
        if self.tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no [MASK]; take a BERT's")
        self.train, self.validation = ([self._tokenize(text) for _, text in part] for part in (train, validation))
        self.source = f"{len(validation)} held-out documents"

    def _tokenize(self, text):
        """int32 (tokens,), line by line: so many threads share the work."""
        lines = tokenize(text.splitlines(), self.tokenizer, None)
        return np.concatenate([np.empty(0, np.int32), *lines])

    def batches(self, pieces, args):
        sizes = args.per_device_train_batch_size, args.max_batch_tokens, args.seed
        return MaskedBatches(pieces, self.tokenizer, args.mlm_probability, *sizes)

    def run(self, run):
        """The result of one Run, or None where it was stopped."""
        args, accelerator = run.args, self.accelerator
        begin_run(accelerator, args.seed)
        start = args.model_name_or_path or new_config(args.config_name, "bert", self.tokenizer)
        model = load_model(start, "bert", "ForMaskedLM", args, args.max_length)
        module, facts = MaskedLoss(model), {}
        if args.do_train:
            pieces = cut(self.train, self.tokenizer, args.max_length)
            step = args.per_device_train_batch_size * accelerator.num_processes
            steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(pieces) / step)
            trainer = TextTrainer(args, accelerator, module, steps, self.batches(pieces, args), EXACT)
            if not trainer.run():
                return None
            facts = {"steps": steps, "train_tokens_per_second": trainer.speed}
            self.tokenizer.model_max_length = args.max_length
            publish(args, accelerator, model.to(torch.bfloat16), self.tokenizer)
            model.float()  # what is saved is what is scored
        model.to(accelerator.device)
        pieces = cut(self.validation, self.tokenizer, args.max_length)
        sums = score_masked(module, self.batches(pieces, args), accelerator)
        loss, right, total = sums.sum(0)
        drawn = bootstrap_weights(len(sums)) @ sums
        return {
            "source": self.source,
            "max_length": args.max_length,
            "accuracy": right / total,
            "ci95": interval(drawn[:, 1] / drawn[:, 2]),
            "masked_perplexity": math.exp(loss / total),
            "num_samples": int(total),
            **facts,
            "peak_memory_mib": round(peak_memory_mib(accelerator.device)),
        }


def main(argv=None):
    started = time.monotonic()
    args = parse_args(argv)
    writable_folder(args.output_dir)
    accelerator = make_accelerator(args)
    start_trackers(args, accelerator, "pretrain_mlm")
    with explain_mistakes("pretrain_mlm.py"):
        runs = plan_runs(args)
        finished = run_all(runs, args, started, PretrainingRun(args, accelerator).run, accelerator.is_main_process)
    report = {
        "task": "masked-language-modelling",
        "model": args.output_dir if args.do_train else args.model_name_or_path,
    }
    if args.do_train:
        report["training"] = {"finished": finished, "start": args.model_name_or_path or args.config_name}
    report["results"] = {run.name: run.result for run in runs if run.result is not None}
    return finish(report, args, accelerator, started)


if __name__ == "__main__":
    main()
