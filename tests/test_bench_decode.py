# SPDX-License-Identifier: Apache-2.0
"""eval/bench_decode.py: its rows, and that a wrong attention is not timed."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import bench_decode  # noqa: E402

from flash_models import attention  # noqa: E402

ARGUMENTS = ["--quick", "--device", "cpu", "--output_dir"]


def test_shares_follow_from_the_times(tmp_path, monkeypatch):
    milliseconds = iter([2.0, 6.0, 3.0] * 4)
    monkeypatch.setattr(
        bench_decode,
        "milliseconds",
        lambda calls, device: {name: (call(), next(milliseconds))[1] for name, call in calls.items()},
    )
    rows = bench_decode.main([*ARGUMENTS, str(tmp_path)])
    assert [(row["head_dim"], row["keys"]) for row in rows] == [(d, n) for d in (64, 128) for n in (1024, 4096)]
    for row in rows:
        assert row["speedup_over_sdpa"] == 3.0 and row["share_of_copy"] == 0.75
        # 16 heads, K and V, 4 bytes, in 2 ms
        assert row["flash_models_gb_per_s"] == pytest.approx(
            16 * row["head_dim"] * row["keys"] * 8 / 2e-3 / 1e9, abs=0.1
        )
    (path,) = tmp_path.glob("decode-cpu-*-quick.csv")
    with path.open() as file:
        assert file.readline().startswith("# commit") and len(list(csv.DictReader(file))) == 4


def test_a_wrong_attention_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_decode.flash_models, "attention", lambda q, k, v: attention(q, k, v, scale=0.2))
    with pytest.raises(SystemExit, match="not timed"):
        bench_decode.main([*ARGUMENTS, str(tmp_path)])
