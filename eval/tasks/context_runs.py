# SPDX-License-Identifier: Apache-2.0
"""What eval/perplexity.py does for each context length and seed: train, score."""

import math
import time

import numpy as np
import torch
from metrics.multilabel_f1 import bootstrap_weights, interval
from tasks.language_modelling import CausalLoss, TokenBlocks, bits_per_byte, perplexity, score_tokens
from tasks.script import begin_run, peak_memory_mib, publish
from tasks.text_corpus import load_corpus
from tasks.text_model import load_model, new_config
from tasks.text_tokenizer import find_tokenizer, train_byte_pairs
from tasks.text_training import TextTrainer

EXACT = ("max_length", "tokens_per_step", "num_train_epochs", "max_train_steps", "short_steps")


class ContextRuns:
    """The text and the tokenizer, which all runs share, and one run."""

    def __init__(self, args, accelerator):
        self.args, self.accelerator = args, accelerator
        train, validation = load_corpus(args, accelerator)
        self.tokenizer = find_tokenizer(args, accelerator, [text for _, text in train], train_byte_pairs)
        self.end = self.tokenizer.eos_token_id
        if self.end is None:
            raise ValueError("the tokenizer has no end-of-text token; take a GPT-2's")
        self.documents = [self._tokenize(text) for _, text in validation]
        self.num_bytes = sum(len(text.encode()) for _, text in validation)
        rows = [part for _, text in train for part in ([self.end], self._tokenize(text))]
        self.tokens = np.concatenate(rows).astype(np.int32) if rows else None
        names = [name for name, _ in validation]
        self.source = f"{len(names)} held-out documents: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}"

    def _tokenize(self, text):
        """int32 (tokens,), line by line: so many threads share the work."""
        lines = text.splitlines(keepends=True)
        ids = self.tokenizer(lines, verbose=False, return_attention_mask=False)["input_ids"]
        return np.fromiter((token for line in ids for token in line), np.int32)

    def run(self, run):
        """The result of one Run, or None where it was stopped."""
        args, accelerator = run.args, self.accelerator
        begin_run(accelerator, args.seed)
        start = args.model_name_or_path or new_config(args.config_name, "gpt2", self.tokenizer)
        model = load_model(start, "gpt2", "LMHeadModel", args, args.max_length)
        facts = {}
        if args.do_train:
            facts = self.fit(model, args)
            if facts is None:
                return None
            self.tokenizer.model_max_length = args.max_length
            publish(args, accelerator, model.to(torch.bfloat16), self.tokenizer)
            model.float()  # what is saved is what is scored
        return {**self.evaluate(model, run), **facts, "peak_memory_mib": round(peak_memory_mib(accelerator.device))}

    def fit(self, model, args):
        """Facts about the training, or None where it was stopped."""
        lengths, short = (max(self.args.max_length), args.max_length), (min(self.args.max_length), args.short_steps)
        blocks = TokenBlocks(self.tokens, *lengths, args.tokens_per_step, args.max_batch_tokens, args.seed, *short)
        steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(self.tokens) / args.tokens_per_step)
        trainer = TextTrainer(args, self.accelerator, CausalLoss(model), steps, blocks, EXACT)
        if not trainer.run():
            return None
        facts = {"steps": steps, "train_tokens": steps * args.tokens_per_step}
        return {**facts, "train_tokens_per_second": trainer.speed}

    def evaluate(self, model, run):
        """Score every token of the validation text once; writes predictions_nll.npz."""
        model.to(self.accelerator.device)
        begun, options = time.monotonic(), (run.length, run.args.stride, run.args.max_batch_tokens)
        nll, tokens = score_tokens(model, self.documents, *options, self.accelerator, self.end)
        seconds = time.monotonic() - begun
        if self.accelerator.is_main_process:
            np.savez_compressed(run.folder / "predictions_nll.npz", nll=nll, tokens=tokens)
        weights = bootstrap_weights(len(nll))
        return {
            "source": self.source,
            "max_length": run.length,
            "stride": run.args.stride,
            "perplexity": float(perplexity(nll.sum(), tokens.sum())),
            "ci95": interval(perplexity(weights @ nll, weights @ tokens)),
            "bits_per_byte": bits_per_byte(nll, self.num_bytes),
            "num_samples": int(tokens.sum()),
            "tokens_per_second": float(tokens.sum() / seconds),
        }


def unit_perplexity(file):
    """(nll, tokens) of each stretch, float64 (units, 2), and how the perplexity follows from their sums."""
    return np.stack((file["nll"], file["tokens"]), 1), perplexity
