# SPDX-License-Identifier: Apache-2.0
"""The parts of eval/pathx.py that need no model: curriculum, augmentation, targets, baseline, intervals."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from metrics.accuracy import accuracy_with_interval, wilson_interval  # noqa: E402
from tasks.pathfinder import PathfinderSpec, generate_samples  # noqa: E402
from tasks.pathx_curriculum import CURRICULA, Chunks, ImageSource, parse_curriculum  # noqa: E402
from tasks.pathx_evaluation import best_threshold_accuracy, find_markers  # noqa: E402
from tasks.pathx_model import augment, trace_map  # noqa: E402
from tasks.pathx_training import curve_layers  # noqa: E402


def test_curriculum():
    stages = parse_curriculum("32:2:1:10:4, 128:::20")
    assert [stage.steps for stage in stages] == [10, 20] and stages[1].batch_size is None
    small, full = stages[0].spec(128), stages[1].spec(128)
    assert full == PathfinderSpec.preset(128)
    assert (small.size, small.contour_length, small.num_distractors) == (32, 2, 1)
    assert (small.dash_length, small.dash_thickness, small.marker_radius) == (5, 1.5, 3)
    for size, curriculum in CURRICULA.items():
        for stage in parse_curriculum(curriculum):
            generate_samples(stage.spec(size), range(2), num_workers=1)
        assert stage.spec(size) == PathfinderSpec.preset(size)


@pytest.mark.parametrize(
    "text, message",
    [
        ("32:2:1", "stage 1 .* has 3 fields"),
        ("32:2:1:10,64:x:1:10", "stage 2 .* whole numbers"),
        ("30:2:1:10", "multiple of 8"),
        (":2:1:10", "multiple of 8"),
        ("32:2:1:0", "steps"),
        ("32:2:1:", "steps"),
        ("32:1:1:5", "contour_length"),
        ("32:2:1:5:0", "batch_size"),
        ("", "has 1 fields"),
    ],
)
def test_curriculum_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse_curriculum(text)


def test_curve_layers():
    assert curve_layers("half", 8) == [4, 5, 6, 7, 8]
    assert curve_layers("last", 8) == [8]
    assert curve_layers("6,2", 8) == [2, 6]
    for wrong in ("9", "0", "middle"):
        with pytest.raises(ValueError, match="curve_loss_layers"):
            curve_layers(wrong, 8)


def test_image_and_trace_turn_together(device):
    images = torch.randint(0, 250, (16, 8, 8), dtype=torch.uint8, device=device)
    turned, trace = augment(images, images, 0.0)
    assert torch.equal(turned, trace) and not torch.equal(turned, images)
    assert torch.equal(turned.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    brighter, trace = augment(images, images, 0.2)
    assert brighter.dtype == torch.uint8
    assert ((brighter.float() - trace.float()).abs() <= 0.2 * trace.float() + 0.5).all()


def test_trace_of_the_generator():
    samples = generate_samples(PathfinderSpec.preset(128), range(6), num_workers=1)
    trace = trace_map(samples.curve_ids, samples.marked)
    assert trace.dtype == np.uint8 and set(samples.label) == {0, 1}
    assert np.array_equal(trace > 0, samples.curve_ids > 0)
    for one, label in zip(trace, samples.label, strict=True):
        assert set(np.unique(one)) == ({0, 1, 3} if label else {0, 1, 2})


def test_markers_are_found():
    samples = generate_samples(PathfinderSpec.preset(128), range(40), num_workers=1)
    found = find_markers(torch.from_numpy(samples.image), 3).numpy()
    true = samples.markers
    either = [np.abs(found - order).max((1, 2)) for order in (true, true[:, ::-1])]
    assert (np.minimum(*either) <= 2).mean() > 0.9


def test_best_threshold():
    generator = np.random.default_rng(0)
    values, labels = generator.integers(0, 6, 50), generator.integers(0, 2, 50)
    shares = [((values > cut) == labels).mean() for cut in range(-1, 7)]
    assert best_threshold_accuracy(values, labels) == pytest.approx(max(*shares, *(1 - share for share in shares)))


def test_accuracy():
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))
    assert wilson_interval(0, 0) == [0.0, 1.0] and wilson_interval(5, 5)[1] == 1.0
    result = accuracy_with_interval([0, 1, 1, 1], [0, 1, 0, 1])
    assert result["accuracy"] == 0.75 and result["per_class"]["0"]["accuracy"] == 0.5
    with pytest.raises(ValueError, match="2 predictions for 1"):
        accuracy_with_interval([0, 1], [0])


def test_images_do_not_depend_on_workers_and_processes():
    chunks = Chunks(parse_curriculum("32:2:1:1")[0].spec(128), 2, ["lra", "original"], 1, 5)

    def labels_and_sums(rank, world, workers, first=0):
        source = ImageSource(chunks, 2, 1, first, 4, rank, world, workers, torch.device("cpu"))
        return [(*labels.tolist(), int(images.sum())) for images, trace, labels in source]

    alone = labels_and_sums(0, 1, 0)
    assert labels_and_sums(0, 1, 2) == alone and labels_and_sums(0, 1, 0, first=2) == alone[2:]
    shared = [labels_and_sums(rank, 2, 0) for rank in (0, 1)]
    assert [shared[0][0], shared[1][0], shared[0][1], shared[1][1]] == alone
