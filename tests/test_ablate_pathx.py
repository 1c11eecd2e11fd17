# SPDX-License-Identifier: Apache-2.0
"""eval/ablate_pathx.py and the masked-pixel pretraining that it uses, on small canvases with a tiny model."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from eval_case import fresh_accelerate, stop_at  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import ablate_pathx  # noqa: E402
import pathx  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tasks.pathx_model import create_model  # noqa: E402
from tasks.pathx_pretraining import HIDDEN, PixelReader, hide_pixels  # noqa: E402
from test_pathx import TINY, config, train  # noqa: E402, F401

SMALL = {key: TINY[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}


def ablate(folder, *arguments):
    options = ["--output_dir", folder, "--results_dir", folder / "results", "--config", json.dumps(SMALL)]
    options += ["--curriculum", "32:2:1:2:2,32:2:2:2:2", "--num_samples", 4, "--num_workers", 0, *arguments]
    return ablate_pathx.main([str(option) for option in options])


def test_squares_are_hidden_and_asked_for():
    torch.manual_seed(0)
    images = torch.randint(256, (8, 32, 32), dtype=torch.uint8)
    masked, target = hide_pixels(images, 0.5)
    asked = target > 0
    assert 0.4 < asked.float().mean() < 0.6
    squares = asked.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).float().mean(3)
    assert set(squares.unique().tolist()) == {0, 1}
    assert (masked[asked] == HIDDEN).all() and torch.equal(masked[~asked], images[~asked])
    assert torch.equal(target[asked], images[asked] // 16 + 1)


def test_the_pixel_loss_counts_hidden_pixels_alone(config):  # noqa: F811
    reader = PixelReader(create_model(32, config)).eval()
    torch.manual_seed(0)
    ids = torch.cat([torch.arange(256, 320), torch.randint(256, (1024,))])[None]
    target = torch.zeros(1, 1024, dtype=torch.uint8)
    assert reader(ids, target, None)[0] == 0
    target[0, 5] = 1 + 9
    level = reader.level_head(reader.model.base_model(input_ids=ids).last_hidden_state[:, 64 + 5])
    assert reader(ids, target, None)[0].item() == pytest.approx(-level.log_softmax(-1)[0, 9].item(), rel=1e-4)


def test_pretraining_learns_pixels_and_leaves_a_classifier(device, config, tmp_path):  # noqa: F811
    steep = ("--masked_pixels", 0.5, "--learning_rate", 5e-3, "--lr_scheduler_type", "constant_with_warmup")
    train(config, tmp_path / "pixels", *steep, curriculum="32:2:1:24:4")
    log = [json.loads(line) for line in (tmp_path / "pixels" / "train_log.jsonl").read_text().splitlines()]
    assert {record["event"] for record in log} == {"train"}  # nothing is scored: the labels are not learned
    losses = [record["pixel_loss"] for record in log]
    assert sum(losses[-3:]) / 3 < math.log(16) - 0.2 < losses[0]
    weights = load_file(tmp_path / "pixels" / "model.safetensors")
    assert not [name for name in weights if "level_head" in name]
    untrained = create_model(32, config).state_dict().keys()
    assert weights.keys() == untrained
    from_there = ("--model_name_or_path", tmp_path / "pixels", "--curve_loss_weight", 0)
    assert train(config, tmp_path / "labels", *from_there, curriculum="32:2:1:1:2")["training"]["finished"]


@pytest.mark.parametrize("share", ["1", "-0.1"])
def test_a_share_is_a_share(share, tmp_path):
    with pytest.raises(SystemExit):
        pathx.main(["--do_train", "--output_dir", str(tmp_path), "--masked_pixels", share])


def test_every_variant_ends_in_one_table_and_is_not_trained_twice(device, tmp_path, monkeypatch, capsys):
    report = ablate(tmp_path)
    assert report["missing"] == [] and json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    assert json.loads((tmp_path / "results" / "pathx-ablation.json").read_text()) == report
    rows = {row["variant"]: row for row in report["variants"]}
    assert rows.keys() == ablate_pathx.VARIANTS.keys()
    assert all(row["num_samples"] == 4 and row["images"] == 8 for row in rows.values())
    assert rows["labels"]["curve_iou"] is None and 0 <= rows["sparse_2d"]["curve_iou"] <= 1
    configs = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in rows}
    assert [configs[name].get("block_sparse") is None for name in ("sparse_1d", "dense_1d", "dense_2d")] == [0, 1, 1]
    kinds = [configs[name]["position_embedding_type"] for name in ("sparse_2d", "sparse_1d", "dense_learned")]
    assert kinds == ["rotary_2d", "rotary", "absolute"]
    text = (tmp_path / "results" / "pathx-ablation.md").read_text()
    assert text.count("\n|") == 9 and "labels, after masked pixels" in text
    monkeypatch.setattr(pathx, "main", lambda arguments: pytest.fail(f"trained again: {arguments}"))
    assert ablate(tmp_path) == report


def test_a_stopped_run_goes_on_with_the_next_call(device, tmp_path, monkeypatch):
    assert ablate(tmp_path, "--variants", "labels", "--max_train_minutes", 0)["missing"] == ["labels"]
    assert not (tmp_path / "labels").exists()
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        stopped = ablate(tmp_path, "--variants", "labels", "sparse_2d")
    assert stopped["missing"] == ["labels", "sparse_2d"] and not (tmp_path / "results").exists()
    report = ablate(tmp_path, "--variants", "labels")
    log = [json.loads(line)["global_step"] for line in (tmp_path / "labels" / "train_log.jsonl").open()]
    assert report["missing"] == [] and log == [2, 2, 4, 4]
