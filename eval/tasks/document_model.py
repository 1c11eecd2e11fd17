# SPDX-License-Identifier: Apache-2.0
"""BERT classifiers of long documents: their loss on padded or packed batches, their scores, their decisions."""

import numpy as np
import torch
from metrics.multilabel_f1 import f1
from tasks.token_batches import to_device
from tasks.training_loop import bar_interval
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

MULTI_LABEL = "multi_label_classification"


class ClassifierLoss(nn.Module):
    """The classifier with its loss, as `TextTrainer` takes it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def logits(self, **inputs):
        """fp32 (documents, labels) of a padded or a packed batch."""
        if "cu_seq_lens_q" not in inputs:
            return self.model(**inputs).logits.float()
        # transformers' classifiers look at the first token of a row; packed documents begin in the middle of one
        bert = self.model.base_model
        hidden = bert(**inputs).last_hidden_state[0]
        first = hidden[inputs["cu_seq_lens_q"][:-1].long()]
        return self.model.classifier(self.model.dropout(bert.pooler(first[:, None]))).float()

    def forward(self, targets, share, **inputs):
        """The documents' losses times `share`: 1 / (documents of the step on this process)."""
        logits = self.logits(**inputs)
        if targets.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") * (share / logits.shape[1])
        return F.cross_entropy(logits, targets, reduction="sum") * share


@torch.no_grad()  # not inference_mode: tables made here are cached and serve training too
def score_documents(module, batches, accelerator, name):
    """Scores fp32 (documents, labels) on every process: sigmoid for multi-label models, else softmax."""
    module.eval()
    config, world = module.model.config, accelerator.num_processes
    mine = list(range(len(batches.sequences)))[accelerator.process_index :: world]
    scores = torch.zeros(len(batches.sequences), config.num_labels, device=accelerator.device)
    show = accelerator.is_main_process
    bar = tqdm(total=len(mine), desc=f"score {name}", disable=not show, mininterval=bar_interval())
    for group in batches.groups(mine):
        with accelerator.autocast():
            logits = module.logits(**to_device(batches.collate(group), accelerator.device))
        multi_label = config.problem_type == MULTI_LABEL
        scores[torch.tensor(group, device=scores.device)] = logits.sigmoid() if multi_label else logits.softmax(-1)
        bar.update(len(group))
    bar.close()
    return accelerator.reduce(scores, "sum").cpu().numpy()


def best_threshold(scores, references):
    """The one threshold for all labels with the highest micro-F1 on these documents.

    One for all, because that is the best rule for micro-F1 where scores are probabilities (Lipton et al., arXiv
    1402.1892: half of the best F1), and because rare labels are too few to tune one each."""
    order = np.argsort(-scores, axis=None, kind="stable")
    ranked, truth = scores.ravel()[order], references.ravel()[order]
    hits = np.cumsum(truth)
    said = np.arange(1, len(ranked) + 1)
    values = f1(hits, said - hits, truth.sum() - hits)
    values[:-1][ranked[:-1] == ranked[1:]] = -1  # a threshold cannot lie between two equal scores
    best = int(values.argmax())
    below = ranked[best + 1] if best + 1 < len(ranked) else -1.0
    return float((ranked[best] + below) / 2)


def decide(scores, threshold):
    """bool (documents, labels): above `threshold`, or, where that is None, the label with the highest score."""
    if threshold is not None:
        return scores > threshold
    return np.arange(scores.shape[1]) == scores.argmax(1)[:, None]
