# SPDX-License-Identifier: Apache-2.0
"""eval/bench_layouts.py: its rows, and that a wrong layout is not timed."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import bench_layouts  # noqa: E402

ARGUMENTS = ["--device", "cpu", "--length", "4096", "--rounds", "1", "--output_dir"]


def test_every_pattern_has_its_row(tmp_path):
    rows = bench_layouts.main([*ARGUMENTS, str(tmp_path)])
    assert len(rows) == 10 and {row["pattern"].split(",")[0] for row in rows} == {
        "local_global", "bigbird", "strided", "butterfly", "grid_2d",
    }  # fmt: skip
    for row in rows:
        assert 0 < row["density"] <= 1 and 0 < row["host_ms"] <= row["ms"]
    (path,) = tmp_path.glob("layouts-cpu-*.csv")
    with path.open() as file:
        assert file.readline().startswith("# commit") and len(list(csv.DictReader(file))) == 10


def test_a_wrong_layout_is_not_timed(tmp_path, monkeypatch):
    local_global, built = bench_layouts.layouts.local_global, []

    def drifting(length, window, n_global, **options):
        built.append(options)
        return local_global(length, window * len(built), n_global, **options)

    monkeypatch.setattr(bench_layouts.layouts, "local_global", drifting)
    with pytest.raises(SystemExit, match="local_global.*not timed"):
        bench_layouts.main([*ARGUMENTS, str(tmp_path)])


def test_a_length_that_is_no_square(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_layouts.main(["--device", "cpu", "--length", "5000", "--output_dir", str(tmp_path)])
    assert "no square" in capsys.readouterr().err
