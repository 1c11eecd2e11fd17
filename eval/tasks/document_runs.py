# SPDX-License-Identifier: Apache-2.0
"""What eval/long_document.py does for each length and seed: train, tune the threshold, score."""

import math
import time

import numpy as np
import torch
import transformers
from metrics.multilabel_f1 import document_counts, f1, f1_with_interval
from tasks.document_model import (
    MULTI_LABEL,
    ClassifierLoss,
    best_threshold,
    decide,
    score_documents,
)
from tasks.documents import DocumentBatches, label_matrix, label_set, tokenize, with_special_tokens
from tasks.script import begin_run, compute_metric, peak_memory_mib, publish
from tasks.text_files import tell_problems
from tasks.text_model import load_model
from tasks.text_training import TextTrainer

EXACT = (
    "max_length",
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_train_steps",
    "threshold_split",
    "dropout",
)


class DocumentRuns:
    """The data and the tokenizer, which all runs share, and one run: train, tune the threshold, score."""

    def __init__(self, args, accelerator, train, validation):
        self.args, self.accelerator, self.train, self.validation = args, accelerator, train, validation
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_name_or_path)
        if self.tokenizer.cls_token_id is None or self.tokenizer.sep_token_id is None:
            raise ValueError(f"the tokenizer of {args.model_name_or_path} has no [CLS] and [SEP]; take a BERT's")
        self.names = None
        for documents in filter(None, (train, validation)):
            show = accelerator.is_main_process
            documents.tokens = tokenize(documents.texts, self.tokenizer, max(args.max_length), show)
            if show:
                tell_problems(documents.problems)
        self.tuning = None
        if train is not None:
            self.names = label_set(train)
            if train.multi_label:
                self.train, self.tuning = train.split(args.threshold_split)

    def batches(self, documents, args, targets=None):
        sequences = [with_special_tokens(tokens, self.tokenizer, args.max_length) for tokens in documents.tokens]
        budget = args.per_device_train_batch_size, args.max_batch_tokens, args.unpad, args.seed
        return DocumentBatches(sequences, targets, *budget, self.tokenizer.pad_token_id)

    def model(self, args):
        options = {}
        if self.names:
            options = {
                "num_labels": len(self.names),
                "id2label": dict(enumerate(self.names)),
                "label2id": {name: place for place, name in enumerate(self.names)},
                "problem_type": MULTI_LABEL if self.train.multi_label else "single_label_classification",
                "ignore_mismatched_sizes": True,  # of the head of a checkpoint with other labels
            }
            if args.dropout is not None:
                options["hidden_dropout_prob"] = options["classifier_dropout"] = args.dropout
        else:
            trained = transformers.AutoConfig.from_pretrained(args.model_name_or_path).architectures or [""]
            if not trained[0].endswith("ForSequenceClassification"):
                raise ValueError(f"{args.model_name_or_path} has no trained classifier; make one with --do_train")
        start = args.model_name_or_path
        return load_model(start, "bert", "ForSequenceClassification", args, args.max_length, **options)

    def run(self, run):
        """The result of one Run, or None where it was stopped."""
        args, accelerator = run.args, self.accelerator
        begin_run(accelerator, args.seed)
        model = self.model(args)
        facts = {}
        if self.train is not None:
            facts = self.fit(model, args)
            if facts is None:
                return None
            model = model.to(torch.bfloat16).float()  # what is saved is what is scored
        module = ClassifierLoss(model.to(accelerator.device))
        if self.tuning:
            scores = score_documents(module, self.batches(self.tuning, args), accelerator, self.tuning.source)
            model.config.decision_threshold = best_threshold(scores, label_matrix(self.tuning, self.names)[0])
        if self.train is not None:
            self.tokenizer.model_max_length = args.max_length
            publish(args, accelerator, model.to(torch.bfloat16), self.tokenizer)
            model.float()
        result = self.evaluate(module, run)
        return {**result, **facts, "peak_memory_mib": round(peak_memory_mib(accelerator.device))}

    def fit(self, model, args):
        """Facts about the training, or None where it was stopped."""
        step = args.per_device_train_batch_size * self.accelerator.num_processes
        steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(self.train) / step)
        targets, _ = label_matrix(self.train, self.names)
        targets = targets.astype(np.float32) if self.train.multi_label else targets.argmax(1)
        batches = self.batches(self.train, args, targets)
        trainer = TextTrainer(args, self.accelerator, ClassifierLoss(model), steps, batches, EXACT)
        if not trainer.run():
            return None
        return {"steps": steps, "train_tokens_per_second": trainer.speed}

    def evaluate(self, module, run):
        """Score the validation documents; writes predictions_eval.npz."""
        config = module.model.config
        multi_label = config.problem_type == MULTI_LABEL
        if multi_label != self.validation.multi_label:
            kinds = "lists of labels", "single labels"
            raise ValueError(
                f"{self.validation.source} has {kinds[not self.validation.multi_label]}, but the model was trained on "
                f"{kinds[not multi_label]}"
            )
        names = [config.id2label[place] for place in range(config.num_labels)]
        _, unknown = label_matrix(self.validation, names)
        begun = time.monotonic()
        scores = score_documents(module, self.batches(self.validation, run.args), self.accelerator, run.name)
        seconds = time.monotonic() - begun
        threshold = getattr(config, "decision_threshold", 0.5) if multi_label else None
        # a label that the model does not have is one that it never says: a column of its own
        references, _ = label_matrix(self.validation, names + sorted(unknown))
        predictions = np.pad(decide(scores, threshold), ((0, 0), (0, len(unknown))))
        if self.accelerator.is_main_process:
            path = run.folder / "predictions_eval.npz"
            np.savez_compressed(path, predictions=predictions, references=references, scores=scores.astype(np.float16))
        return {
            "source": self.validation.source,
            "max_length": run.length,
            **self._score(predictions, references, names + sorted(unknown)),
            "threshold": threshold,
            "unknown_labels": unknown,
            "empty_documents": self.validation.num_empty,
            "left_out": len(self.validation.problems),
            "documents_per_second": len(scores) / seconds,
        }

    def _score(self, predictions, references, labels):
        given = {"predictions": predictions.astype(np.int8), "references": references.astype(np.int8), "labels": labels}
        if not self.accelerator.is_main_process:  # `evaluate` keeps files that processes would write over each other
            return f1_with_interval(**given)
        return compute_metric("multilabel_f1", f1_with_interval, **given)


def document_f1(file):
    """(hits, wrong, missed) of each document, int64 (documents, 3), and how micro-F1 follows from their sums."""
    return document_counts(file["predictions"], file["references"]), f1
