# SPDX-License-Identifier: Apache-2.0
"""eval/bench_pathx.py: its rows and report on a small model, and that a wrong attention is not timed."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import bench_pathx  # noqa: E402
from tasks.pathx_model import create_model  # noqa: E402
from test_pathx import TINY  # noqa: E402

from flash_models import attention, hf  # noqa: E402


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**TINY, "hidden_dropout_prob": 0.0}))
    return str(path)


def test_every_implementation_is_timed_and_compared_with_sdpa(config, tmp_path, capsys):
    arguments = ["--quick", "--device", "cpu", "--config_name", config, "--output_dir", str(tmp_path)]
    bench_pathx.main([*arguments, "--image_size", "32", "--dense_batch_size", "2"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    with open(report["csv"]) as file:
        assert file.readline().startswith("# commit")
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["tokens"] for row in rows} == {str(64 + 32 * 32)}
    for row in rows:
        assert row["batch"] == ("1" if row["implementation"] == "block_sparse" else "2")
        speed = float(row["images_per_second"])
        assert speed == pytest.approx(1e3 * int(row["batch"]) / float(row["ms"]), rel=0.02)
        peer = next(r for r in rows if (r["pass"], r["implementation"]) == (row["pass"], "sdpa"))
        assert float(row["speedup_over_sdpa"]) == pytest.approx(speed / float(peer["images_per_second"]), abs=2e-3)
    assert Path(report["csv"]).with_suffix(".png").stat().st_size > 1000


def test_sdpa_stands_in_only_inside_and_sees_what_the_blocks_see(config):
    """The peer is another attention function, and the mask it gets hides the same keys."""
    model = create_model(64, config)
    ours = hf.attention
    with bench_pathx.attention_of("sdpa_masked", model.config, 64, torch.device("cpu")):
        assert hf.attention is not ours
    assert hf.attention is ours
    assert bench_pathx.verify(model, 64, torch.device("cpu")).keys() == {"dense", "block_sparse"}


def test_a_wrong_attention_is_not_timed(config, monkeypatch):
    monkeypatch.setattr(hf, "attention", lambda q, k, v, layout, **options: attention(q, k, v, **options))
    with pytest.raises(SystemExit, match="64 x 64: the error of block_sparse"):
        bench_pathx.verify(create_model(64, config), 64, torch.device("cpu"))
