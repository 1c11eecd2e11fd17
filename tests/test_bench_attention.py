# SPDX-License-Identifier: Apache-2.0
"""eval/bench_attention.py: how it times, and what it does with a peer that does not take a case."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import bench_attention  # noqa: E402
from tasks.attention_cases import Case, peers  # noqa: E402

CPU = torch.device("cpu")


def test_peers_take_turns():
    called = []
    times = bench_attention.milliseconds({name: lambda name=name: called.append(name) for name in "ab"}, CPU)
    assert [name for name, _ in itertools.groupby(called)] == ["a", "b"] * 3
    assert times.keys() == {"a", "b"} and all(0 < ms < 100 for ms in times.values())


def test_a_peer_that_refuses_is_left_out(monkeypatch, capsys):
    def refuse(q, k, v):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(bench_attention, "peers", lambda *case: peers(*case) | {"cudnn": (refuse, True)})
    rows = bench_attention.measure(Case(64, True, 130, 1, 2), CPU)
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    for row, factor in zip(rows, (1, 2.5), strict=True):
        assert "cudnn_ms" not in row and row["speedup_over_sdpa"] > 0
        flop = factor * 4 * 2 * 130 * 130 * 64 / 2
        assert row["flash_models_tflops"] == pytest.approx(flop / row["flash_models_ms"] / 1e9, rel=0.2)
    assert "cudnn does not take" in capsys.readouterr().err
