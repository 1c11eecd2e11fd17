# SPDX-License-Identifier: Apache-2.0
"""Micro- and macro-averaged F1 with a 95% bootstrap interval, as a local `evaluate` metric.

evaluate.load("eval/metrics/multilabel_f1.py").compute(predictions=[[1, 0], [1, 1]], references=[[1, 0], [0, 1]])

Predictions and references are rows of 0 and 1, one column a label. One-of-many classification is the case of one 1 a
row, where micro-F1 is the accuracy. `f1_with_interval` is the same arithmetic without `evaluate`.
Interval: percentiles over documents drawn with replacement (Efron, 1979), 1,000 draws from a fixed seed.
"""

import numpy as np

try:
    import datasets
    import evaluate
except ImportError:
    evaluate = None

DRAWS = 1000


def f1(hits, wrong, missed):
    """2 hits / (2 hits + wrong + missed), elementwise; 0 where there is nothing to find and nothing was said."""
    both = 2 * np.asarray(hits, np.float64)
    return both / np.maximum(both + wrong + missed, 1e-9)


def document_counts(predictions, references):
    """int64 (documents, 3): hits, wrong and missed labels of each document, of two 0/1 matrices (documents, labels)."""
    predictions, references = np.asarray(predictions, bool), np.asarray(references, bool)
    if predictions.shape != references.shape or predictions.ndim != 2:
        raise ValueError(
            f"got predictions of shape {predictions.shape} for references of shape {references.shape}; "
            "expected two equal (documents, labels)"
        )
    return np.stack(
        [(predictions & references).sum(1), (predictions & ~references).sum(1), (references & ~predictions).sum(1)], 1
    )


def bootstrap_weights(documents, draws=DRAWS, seed=0):
    """float64 (draws, documents): how often each document stands in each sample drawn with replacement."""
    draw = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), size=draws)
    return draw.astype(np.float64)


def interval(values):
    """[2.5th, 97.5th percentile]."""
    return [float(value) for value in np.percentile(values, (2.5, 97.5))]


def f1_with_interval(predictions, references, labels=None):
    """Returns f1 (= micro_f1), ci95 (of it), macro_f1, num_samples, per_label {name: f1, support, predicted}.

    macro_f1 is the mean over the labels that occur in references or predictions. labels: names of the columns."""
    counts = document_counts(predictions, references)
    predictions, references = np.asarray(predictions, bool), np.asarray(references, bool)
    if not len(counts):
        raise ValueError("got no documents; F1 needs at least one")
    hits = (predictions & references).sum(0)
    said, true = predictions.sum(0), references.sum(0)
    each = f1(hits, said - hits, true - hits)
    occurs = (said + true) > 0
    micro = float(f1(*counts.sum(0)))
    return {
        "f1": micro,
        "ci95": interval(f1(*(bootstrap_weights(len(counts)) @ counts).T)),
        "micro_f1": micro,
        "macro_f1": float(each[occurs].mean()) if occurs.any() else 0.0,
        "num_samples": len(counts),
        "per_label": {
            str(name): {"f1": float(each[i]), "support": int(true[i]), "predicted": int(said[i])}
            for i, name in enumerate(labels if labels is not None else range(len(each)))
        },
    }


if evaluate is not None:

    class MultilabelF1(evaluate.Metric):
        def _info(self):
            row = datasets.Sequence(datasets.Value("int8"))
            return evaluate.MetricInfo(
                description=__doc__,
                citation="",
                inputs_description="predictions, references: rows of 0 and 1; labels: names of the columns",
                features=datasets.Features({"predictions": row, "references": row}),
            )

        def _compute(self, predictions, references, labels=None):
            return f1_with_interval(predictions, references, labels)
