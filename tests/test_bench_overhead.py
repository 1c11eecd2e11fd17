# SPDX-License-Identifier: Apache-2.0
"""eval/bench_overhead.py: its rows, whose attention each model calls, and that a wrong model is not timed."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import bench_overhead  # noqa: E402

from flash_models import hf  # noqa: E402

ARGUMENTS = ["--quick", "--device", "cpu", "--length", "16", "--rounds", "1", "--output_dir"]


def test_every_implementation_has_its_turn(tmp_path, monkeypatch):
    ours = []
    attention = hf.attention
    monkeypatch.setattr(hf, "attention", lambda *args, **options: ours.append(options) or attention(*args, **options))
    rows = bench_overhead.main([*ARGUMENTS, str(tmp_path)])
    assert [row["call"] for row in rows] == ["attention", "forward", "forward, mask of ones", "training step"]
    # a warm-up and a round of 100 calls; 12 layers: 10 passes twice without and with a mask, 5 steps, one to verify
    assert len(ours) == 2 * (100 + 12 * (10 + 10 + 5)) + 12
    assert all(options["kv_range"] is None for options in ours), "a mask of ones is no padding"
    for row in rows:
        assert row["error_ratio"] <= 2 and 0 < row["flash_models_host_us"] <= row["flash_models_us"]
        assert row["speedup_over_sdpa"] == pytest.approx(row["sdpa_us"] / row["flash_models_us"], rel=1e-2)
    (path,) = tmp_path.glob("overhead-cpu-*-quick.csv")
    with path.open() as file:
        assert file.readline().startswith("# commit") and len(list(csv.DictReader(file))) == 4


def test_rounds_are_interleaved_and_the_first_does_not_count(monkeypatch):
    clock = [0.0]
    order = []

    def call(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds[min(order.count(name), len(seconds)) - 1]

        return run

    monkeypatch.setattr(bench_overhead.time, "perf_counter", lambda: clock[0])
    calls = {"a": call("a", [50.0, 1.0, 2.0, 9.0]), "b": call("b", [4.0])}
    times = bench_overhead.interleaved(calls, bench_overhead.torch.device("cpu"), rounds=3, number=1)
    assert order == ["a", "b"] * 4
    assert times == {"a": [2e6, 2e6], "b": [4e6, 4e6]}


def test_a_wrong_model_is_not_timed(tmp_path, monkeypatch):
    attention = hf.attention
    monkeypatch.setattr(hf, "attention", lambda *args, **options: attention(*args, **{**options, "scale": 9.0}))
    with pytest.raises(SystemExit, match="not timed"):
        bench_overhead.main([*ARGUMENTS, str(tmp_path)])
