# SPDX-License-Identifier: Apache-2.0
"""Pathfinder images: templates to the grey level, statistics of the published generator, determinism.

The figures come from images of the published generator (drewlinsley/pathfinder, December 2019 version) in the rendering
of the Long Range Arena release: per statistic its mean over the images and its standard deviation.
"""

import dataclasses
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from tasks.compare_pathfinder import components, grey_templates, statistics  # noqa: E402
from tasks.pathfinder import PathfinderSpec, generate, generate_batch, generate_samples, split_seed  # noqa: E402
from tasks.pathfinder_generate import prepare  # noqa: E402
from tasks.pathfinder_render import dash_templates, marker_templates  # noqa: E402

SMALL = PathfinderSpec.preset(32)

MARKERS = {
    32: """
      0   0   0   0   0   0   0
      0   0  24  59   0   0   0
      0  24 206 245 117   0   2
      0  59 245 255 172   0   1
      0   0 117 172  42   0   2
      0   0   0   0   0   2   0
      0   0   2   1   2   0   0""",
    64: """
      0   0   0   0   0   0   1   0   0
      0   0   0  27  55   2   0   1   0
      0   0 150 221 218 210  57   0   2
      0  27 221 223 214 241 130   0   3
      0  55 218 214 213 226 153   0   0
      0   2 210 241 226 255  98   0   4
      1   0  57 130 153  98  14   0   0
      0   1   0   0   0   0   0   0   0
      0   0   2   3   0   4   0   0   0""",
    128: """
      0   3   0   0   0   0   0   1   0
      3   0  56 135 157 103   4   0   1
      0  56 234 245 235 254 158   0   0
      0 135 245 218 223 224 228  28   0
      0 157 235 223 225 225 225  57   0
      0 103 255 224 225 237 215   2   0
      0   4 158 228 225 215  68   0   1
      1   0   0  28  57   2   0   0   0
      0   1   0   0   0   0   1   0   0""",
    256: """
      0   0   2   0   0   0   0   0   0   1   0   0   0
      0   1   0  15 105 129 157 115  67   0   0   1   0
      2   0  67 220 245 244 239 248 240 158   2   0   0
      0  15 220 237 222 224 225 223 223 255 116   0   3
      0 105 245 222 228 228 228 228 226 230 210   7   0
      0 129 244 224 228 228 228 228 227 230 221  26   0
      0 157 239 225 228 228 228 228 227 228 227  56   0
      0 115 248 223 228 228 228 228 227 229 220   8   0
      0  67 240 223 226 227 227 227 221 240 174   0   0
      1   0 158 255 230 230 228 229 240 237  51   0   3
      0   0   2 116 210 221 227 220 174  51   0   3   0
      0   1   0   0   7  26  56   8   0   0   3   0   0
      0   0   0   3   0   0   0   0   0   3   0   0   0""",
}

# size: (images of ours, images of theirs, {statistic: (mean, standard deviation, half of its last printed digit)})
PUBLISHED = {
    32: (1000, 1000, {"mean": (19.82, 2.33, 0.005), ">0": (0.3823, 0.0469, 5e-5), ">40": (0.1472, 0.0178, 5e-5),
                      "parts": (13.6, 3.0, 0.05), "distance": (12.9, 5.2, 0.05), "distractors": (2.12, 1.23, 0.005)}),
    64: (250, 1000, {"mean": (16.26, 1.86, 0.005), ">0": (0.2774, 0.0312, 5e-5), ">40": (0.1324, 0.0158, 5e-5),
                     "parts": (17.4, 4.4, 0.05), "distance": (31.1, 10.0, 0.05), "distractors": (5.43, 1.56, 0.005)}),
    128: (400, 2000, {"mean": (9.50, 0.75, 0.005), ">0": (0.1606, 0.0110, 5e-5), ">40": (0.0667, 0.0058, 5e-5),
                      "parts": (85.8, 5.9, 0.05), "distance": (75.6, 19.4, 0.05), "distractors": (14.90, 1.67, 0.005)}),
    256: (200, 400, {"mean": (3.37, 0.05, 0.005), ">0": (0.0476, 0.0007, 5e-5), ">40": (0.0221, 0.0003, 5e-5),
                     "parts": (87.3, 1.2, 0.05), "distance": (126.4, 22.0, 0.05), "distractors": (14.94, 0.23, 0.005)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def samples():
    return {
        size: generate_samples(PathfinderSpec.preset(size), [split_seed("test", i, 9) for i in range(count)])
        for size, (count, _, _) in PUBLISHED.items()
    }


@pytest.mark.parametrize("size", MARKERS)
def test_marker_is_the_published_one_to_the_grey_level(size):
    expected = np.array([[int(value) for value in line.split()] for line in MARKERS[size].strip().split("\n")])
    pixels, _ = grey_templates(PathfinderSpec.preset(size))
    cut = (len(pixels) - len(expected)) // 2
    np.testing.assert_array_equal(pixels[cut:-cut, cut:-cut], expected)


@pytest.mark.parametrize("size", MARKERS)
def test_markers_of_images(size, samples):
    """Nothing in an image is darker than its markers, and most of a marker has its very grey levels."""
    template, _ = grey_templates(PathfinderSpec.preset(size))
    reach = len(template) // 2
    inside = samples[size].markers
    far = ((inside >= reach + 2) & (inside < size - reach - 2)).all((1, 2))
    assert far.sum() > 20
    for image, markers in zip(samples[size].image[far], inside[far], strict=True):
        for y, x in markers:
            window = image[y - reach : y + reach + 1, x - reach : x + reach + 1]
            assert (window >= template).all()
            assert (window == template)[template > 200].mean() > 0.5


def test_peaks_of_templates():
    """Overshoot of the resampling, published to four digits."""
    for size, peaks in {64: [1.0770], 128: [1.2171, 1.2156]}.items():
        tables = prepare(PathfinderSpec.preset(size))[0]
        assert [round(float(dash_templates([stack], "lra")[1].max()), 4) for stack in tables.lines] == peaks
    for radius, peak in {1.5: 1.1139, 2.5: 1.1610, 3: 1.1244, 5: 1.1179}.items():
        templates = marker_templates(radius, "lra")
        assert round(float(templates[len(templates) // 2, len(templates) // 2].max()), 4) == peak


@pytest.mark.parametrize(
    "size, margin, forbidden, tails", [(32, 0, 330, 0.65), (64, 0, 265, 42), (128, 0, 6, 1781), (128, 1, 0, 1642)]
)
def test_room_for_the_first_dash(size, margin, forbidden, tails):
    """Orientations that the published generator can not start with, and its mean number of start pixels."""
    tables = prepare(PathfinderSpec.preset(size))[0]
    first = tables.margins[1][margin]
    start, _, boxes, _, _ = tables.seeds
    assert (np.diff(start)[first : first + 360] == 0).sum() == forbidden
    box = boxes[first : first + 360]
    count = np.maximum(box[:, 1] - box[:, 0] + 1, 0) * np.maximum(box[:, 3] - box[:, 2] + 1, 0)
    assert count.mean() == pytest.approx(tails, abs=0.5 if tails > 1 else 0.005)


@pytest.mark.parametrize("size", PUBLISHED)
def test_statistics_are_the_published_ones(size, samples):
    """Our mean and theirs differ by at most 4 standard errors of the difference, sqrt(s^2/n + s'^2/n'), beyond the
    rounding of the printed figure: for the 24 comparisons a right generator fails with probability 0.002."""
    ours, theirs, published = PUBLISHED[size]
    sample = samples[size]
    image, bright = sample.image, sample.image > 40
    values = {
        "mean": image.mean((1, 2)),
        ">0": (image > 0).mean((1, 2)),
        ">40": bright.mean((1, 2)),
        "parts": np.array([components(mask) for mask in bright]),
        "distance": np.linalg.norm(sample.markers[:, 0] - sample.markers[:, 1], axis=1),
        "distractors": sample.num_distractors,
    }
    for name, (mean, deviation, rounding) in published.items():
        error = np.hypot(values[name].std(ddof=1) / ours**0.5, deviation / theirs**0.5)
        assert abs(values[name].mean() - mean) <= 4 * error + rounding, name


def test_original_rendering_is_the_published_one():
    """mean, >0 and >40 of 2,000 images of the published generator as it saves them; the tolerance as above."""
    images, _ = generate_batch(PathfinderSpec.preset(128), [split_seed("test", i, 9) for i in range(200)], "original")
    for value, mean, deviation in (
        (images.mean((1, 2)), 11.39, 0.91),
        ((images > 0).mean((1, 2)), 0.2013, 0.0130),
        ((images > 40).mean((1, 2)), 0.0752, 0.0063),
    ):
        assert abs(value.mean() - mean) <= 4 * np.hypot(value.std() / 200**0.5, deviation / 2000**0.5)
    assert (images.max((1, 2)) == 255).all()


def test_images_decompose_into_dashes_exactly(samples):
    """The measure of `compare_pathfinder`, 0.996 for images of the published generator."""
    rows = statistics(samples[128].image[:16], PathfinderSpec.preset(128))
    assert np.nanmean(rows[:, -1]) > 0.98


@pytest.mark.parametrize("size", PUBLISHED)
def test_label_is_the_connection_of_the_markers(size, samples):
    sample, count = samples[size], len(samples[size].label)
    np.testing.assert_array_equal(sample.label, sample.marked[:, 0] == sample.marked[:, 1])
    assert set(np.unique(sample.marked)) == {1, 2}
    for curves, marked, markers in zip(sample.curve_ids, sample.marked, sample.markers, strict=True):
        for curve, (y, x) in zip(marked, markers, strict=True):
            assert curve in curves[y - 1 : y + 2, x - 1 : x + 2]
    # labels and the choice of the first marked curve are fair coins: within 4 standard errors of a half
    assert abs(sample.label.mean() - 0.5) < 4 * 0.5 / count**0.5
    assert abs((sample.marked[:, 0] == 1).mean() - 0.5) < 4 * 0.5 / count**0.5


def test_curve_ids_cover_the_dashes(samples):
    sample, spec = samples[128], PathfinderSpec.preset(128)
    for i in range(50):
        ids = np.unique(sample.curve_ids[i])
        np.testing.assert_array_equal(ids, np.arange(3 + sample.num_distractors[i]))
        # a dash of length 5 and thickness 1.5 covers 8 pixels or more
        for curve, dashes in ((1, spec.contour_length), (2, spec.contour_length), (3, spec.distractor_length)):
            assert (sample.curve_ids[i] == curve).sum() > 6 * dashes
        y, x = np.indices((128, 128))
        near = (np.abs(y[None] - sample.markers[i, :, :1, None]) < 8) & (
            np.abs(x[None] - sample.markers[i, :, 1:, None]) < 8
        )
        outside = ~near.any(0)
        assert (sample.curve_ids[i][(sample.image[i] > 60) & outside] > 0).all()
        assert (sample.image[i][(sample.curve_ids[i] > 0) & outside] >= 40).all()


def test_one_seed_one_image():
    seeds = [split_seed("train", i) for i in range(150)] + [2**63, 2**64 - 1]
    one = generate_samples(SMALL, seeds, num_workers=1)
    for workers in (2, 5):
        for field, other in zip(one, generate_samples(SMALL, seeds, num_workers=workers), strict=True):
            np.testing.assert_array_equal(field, other)
    for i in (0, 77, 151):
        for field, alone in zip(one, generate(SMALL, seeds[i]), strict=True):
            np.testing.assert_array_equal(field[i], alone)
    assert len(np.unique(one.image.reshape(152, -1), axis=0)) == 152
    images, labels = generate_batch(SMALL, seeds)
    np.testing.assert_array_equal(images, one.image)
    np.testing.assert_array_equal(labels, one.label)


def test_seeds_keep_their_images():
    """Published scores are scores on these images: raise GENERATOR_VERSION if this has to change."""
    checksums = {}
    for size in PUBLISHED:
        sample = generate(PathfinderSpec.preset(size), split_seed("test", 0))
        checksums[size] = (zlib.crc32(sample.image.tobytes()), int(sample.label), sample.markers.tolist())
    assert checksums == GOLDEN


# checksum of the image, label, markers
GOLDEN = {
    32: (4047558281, 1, [[14, 16], [9, 29]]),
    64: (297426703, 1, [[36, 36], [36, 4]]),
    128: (807779645, 1, [[71, 73], [15, 29]]),
    256: (5040864, 1, [[92, 85], [92, 191]]),
}


def test_other_sizes_and_lengths():
    path_x = PathfinderSpec.preset(128)
    for size, contour, distractors, distance in (
        (32, 3, 1, 4),
        (48, 4, 2, 8),
        (64, 5, 4, 12),
        (64, 6, 4, 10),
        (96, 9, 8, 15),
    ):
        spec = dataclasses.replace(
            path_x, size=size, contour_length=contour, num_distractors=distractors, seed_distance=distance
        )
        sample = generate_samples(spec, range(40))
        assert sample.image.shape == (40, size, size) and (sample.image.max((1, 2)) == 255).all()
        assert sample.num_distractors.max() > 0 and set(sample.margin) == {2, 3}
        assert (sample.curve_ids.max((1, 2)) == 2 + sample.num_distractors).all()


def test_impossible_specs_say_so():
    with pytest.raises(RuntimeError, match="300 attempts at two curves of 40 dashes"):
        generate_batch(dataclasses.replace(SMALL, contour_length=40, max_attempts=300), range(70), num_workers=3)
    with pytest.raises(ValueError, match="smaller seed_distance"):
        generate(dataclasses.replace(PathfinderSpec.preset(128), size=64), 0)
    for change, word in (
        ({"size": 8}, "size"),
        ({"padding": 0}, "padding"),
        ({"dash_thickness": 0.7}, "multiple of 0.5"),
        ({"dash_margins": ()}, "dash_margins"),
        ({"contour_length": 1}, "contour_length"),
        ({"num_distractors": 300}, "num_distractors"),
    ):
        with pytest.raises(ValueError, match=word):
            dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match="presets? of size 100"):
        PathfinderSpec.preset(100)
    with pytest.raises(ValueError, match="rendering"):
        generate(SMALL, 0, "png")
    with pytest.raises(ValueError, match="2\\^64"):
        generate(SMALL, -1)
