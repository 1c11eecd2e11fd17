# SPDX-License-Identifier: Apache-2.0
"""Accuracy with its 95% Wilson interval and the accuracy of each class, as a local `evaluate` metric.

evaluate.load("eval/metrics/accuracy.py").compute(predictions=[0, 1, 1], references=[0, 1, 0])

`accuracy_with_interval` is the same arithmetic without `evaluate`, for machines that do not have it.
Interval: E. B. Wilson, JASA 22 (1927); unlike the normal one it stays inside [0, 1] and is right for small samples.
"""

import math

try:
    import datasets
    import evaluate
except ImportError:
    evaluate = None


def wilson_interval(hits, total, z=1.959964):
    """[low, high] of the success probability after `hits` of `total` trials; z = 1.96 gives 95%."""
    if total == 0:
        return [0.0, 1.0]
    share = hits / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return [max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)]


def accuracy_with_interval(predictions, references):
    """Both sequences of int class numbers, same length. Returns accuracy, ci95, num_samples, per_class."""
    predictions, references = [int(p) for p in predictions], [int(r) for r in references]
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions for {len(references)} references; give one each")
    classes = {}
    for prediction, reference in zip(predictions, references, strict=True):
        hits, total = classes.get(reference, (0, 0))
        classes[reference] = (hits + (prediction == reference), total + 1)
    hits, total = (sum(column) for column in zip(*classes.values(), strict=True)) if classes else (0, 0)
    return {
        "accuracy": hits / max(1, total),
        "ci95": wilson_interval(hits, total),
        "num_samples": total,
        "per_class": {
            str(label): {"accuracy": h / n, "ci95": wilson_interval(h, n), "num_samples": n}
            for label, (h, n) in sorted(classes.items())
        },
    }


if evaluate is not None:

    class Accuracy(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(
                description=__doc__,
                citation="",
                inputs_description="predictions, references: lists of int class numbers",
                features=datasets.Features(
                    {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
                ),
            )

        def _compute(self, predictions, references):
            return accuracy_with_interval(predictions, references)
