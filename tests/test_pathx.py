# SPDX-License-Identifier: Apache-2.0
"""eval/pathx.py as a whole: exact resume, damaged states, evaluation and its JSON. Small canvases, a tiny model."""

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pathx
import pytest
import torch
from eval_case import assert_same_state, fresh_accelerate, stop_at  # noqa: F401
from safetensors.torch import load_file
from tasks.pathfinder import PathfinderSpec, generate_batch
from tasks.pathx_evaluation import image_sets
from tasks.pathx_model import check_fits, create_model
from tasks.training_state import StateError, find_state, load_state

TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
    "num_global_tokens": 64,
    "position_embedding_type": "rotary_2d",
    "rotary_max_wavelength": 256.0,
    "block_sparse": {"pattern": "grid_2d", "radius": 1, "block_size": 64},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def run(*arguments):
    return pathx.main([str(argument) for argument in arguments])


def train(config, output, *arguments, curriculum="32:2:1:4:2,32:2:2:3:2"):
    common = ("--do_train", "--config_name", config, "--num_workers", 0, "--num_eval_samples", 0, "--seed", 3)
    short = ("--logging_steps", 2, "--num_validation_samples", 4, "--data_echo", 2, "--num_warmup_steps", 2)
    return run(*common, *short, "--curriculum", curriculum, "--output_dir", output, *arguments)


@pytest.fixture
def images_file(tmp_path):
    images, labels = generate_batch(PathfinderSpec.preset(32), range(12), num_workers=1)
    path = tmp_path / "given_32.npz"
    np.savez(path, images=images, labels=labels)
    return path


def test_resume_is_exact(device, config, tmp_path, monkeypatch):
    assert train(config, tmp_path / "whole")["training"] == {"finished": True, "steps": 7, "of": 7}
    for step in (2, 4, 6):  # inside a stage, at its end, in the last one
        parts = tmp_path / f"stopped_at_{step}"
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert train(config, parts)["training"] == {"finished": False, "steps": step, "of": 7}
        assert not (parts / "model.safetensors").exists()
        train(config, parts, "--resume_from_checkpoint", parts)
        assert_same_state(parts, tmp_path / "whole", device, ("model", "ema", "exp_avg", "exp_avg_sq"))


def test_training_saves_a_plain_checkpoint_and_its_course(device, config, tmp_path):
    train(config, tmp_path / "out", curriculum="32:2:1:2:2")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert not [name for name in weights if "curve_heads" in name]
    events = [json.loads(line)["event"] for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert events == ["train", "validation"]
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000
    state = tmp_path / "out" / "checkpoint"
    assert len(list(state.iterdir())) <= 6 and not list(state.parent.glob("checkpoint.*"))


def test_curve_loss_falls(device, config, tmp_path):
    train(
        config,
        tmp_path,
        "--learning_rate",
        5e-3,
        "--lr_scheduler_type",
        "constant_with_warmup",
        curriculum="32:2:1:24:4",
    )
    records = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    losses = [record["curve_loss"] for record in records if record["event"] == "train"]
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


def test_path256_goes_on_from_a_path_x_model(config, tmp_path, monkeypatch):
    train(config, tmp_path / "small", curriculum="32:2:1:2:2")
    options = ["--do_train", "--model_name_or_path", tmp_path / "small", "--curriculum", "64:2:1:2:2", "--seed", "1"]
    options += ["--num_workers", "0", "--num_validation_samples", "0", "--num_eval_samples", "0"]
    monkeypatch.setattr("sys.argv", ["path256.py", *map(str, options), "--output_dir", str(tmp_path / "large")])
    runpy.run_path(str(Path(pathx.__file__).with_name("path256.py")), run_name="__main__")
    report = json.loads((tmp_path / "large" / "all_results.json").read_text())
    assert report["model"] == str(tmp_path / "large")  # what is scored, not what it began as
    assert report["task"] == "pathfinder-256" and report["training"] == {"finished": True, "steps": 2, "of": 2}
    assert json.loads((tmp_path / "large" / "config.json").read_text())["max_position_embeddings"] == 64 + 256**2
    assert (
        load_file(tmp_path / "large" / "model.safetensors").keys()
        == load_file(tmp_path / "small" / "model.safetensors").keys()
    )


def test_an_earlier_run_is_not_overwritten(config, tmp_path):
    train(config, tmp_path, curriculum="32:2:1:1:2")
    with pytest.raises(SystemExit, match="--resume_from_checkpoint"):
        train(config, tmp_path, curriculum="32:2:1:1:2")


def test_labels_alone_train_too(device, config, tmp_path):
    train(config, tmp_path, "--curve_loss_weight", 0, "--gradient_accumulation_steps", 2, curriculum="32:2:1:1:2")
    assert not [name for name in load_file(tmp_path / "checkpoint" / "model.safetensors") if "curve" in name]


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "json", "other"])
def test_damaged_states_name_the_file(config, tmp_path, damage):
    train(config, tmp_path, curriculum="32:2:1:1:2")
    state = tmp_path / "checkpoint"
    named = "ema.safetensors"
    content = (state / named).read_bytes()
    if damage == "truncated":
        (state / named).write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        (state / named).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        (state / named).unlink()
    elif damage == "json":
        named = "trainer_state.json"
        (state / named).write_text("{")
    elif damage == "other":
        named = "model.safetensors"
        Path(config).write_text(json.dumps({**TINY, "intermediate_size": 64}))
    with pytest.raises(SystemExit, match=named):
        train(config, tmp_path, "--resume_from_checkpoint", tmp_path, curriculum="32:2:1:2:2")


def test_a_kill_between_two_renames_loses_nothing(config, tmp_path):
    train(config, tmp_path, curriculum="32:2:1:1:2")
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    shutil.copytree(tmp_path / "checkpoint.old", tmp_path / "checkpoint.tmp")
    assert find_state(tmp_path) == tmp_path / "checkpoint.old"
    assert load_state(tmp_path / "checkpoint")[1]["global_step"] == 1
    with pytest.raises(StateError, match="nothing_here"):
        find_state(tmp_path / "nothing_here")


def test_evaluation_report(device, config, images_file, tmp_path, capsys):
    create_model(32, config).save_pretrained(tmp_path / "model")
    command = (
        "--model_name_or_path",
        tmp_path / "model",
        "--images_file",
        images_file,
        "--output_dir",
        tmp_path / "out",
    )
    run(*command, "--per_device_eval_batch_size", 5, "--num_workers", 0)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "out" / "all_results.json").read_text())
    result = report["results"]["given_32"]
    assert result["num_samples"] == 12 and result["resumed_from"] == 0
    low, high = result["ci95"]
    assert 0 <= low <= result["accuracy"] <= high <= 1
    assert sum(share["num_samples"] for share in result["per_class"].values()) == 12
    assert 0.5 <= result["marker_distance_baseline"] <= 1 and result["images_per_second"] > 0
    assert report["peak_memory_mib"] > 0
    assert (tmp_path / "out" / "sheet_given_32.png").stat().st_size > 1000
    again = run(*command, "--num_workers", 0)["results"]["given_32"]
    assert again["resumed_from"] == 12 and again["accuracy"] == result["accuracy"]


def test_evaluation_of_generated_images(device, config, tmp_path):
    create_model(32, config).save_pretrained(tmp_path / "model")
    arguments = ["--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path, "--num_eval_samples", 4]
    arguments += ["--rendering", "lra", "original", "--num_workers", 0, "--image_size", 32, "--contour_length", 14, 6]
    results = run(*arguments)["results"]
    assert list(results) == ["lra", "original", "lra_contour_6", "original_contour_6"]
    assert {(result["num_samples"], result["size"]) for result in results.values()} == {(4, 32)}
    report = json.loads((tmp_path / "all_results.json").read_text())
    assert report["task"] == "pathfinder-32" and report["results"] == results


def test_image_sets_are_those_of_the_published_difficulties():
    arguments = ["--model_name_or_path", "any", "--contour_length", "14", "9", "6", "--num_eval_samples", "2"]
    args = pathx.parse_args([*arguments, "--image_size", "64"])
    sets = {name: spec for name, _, spec, _, _ in image_sets(args, SimpleNamespace(is_local_main_process=False))}
    assert sets["lra"] == PathfinderSpec.preset(64)
    lengths = {name: (spec.contour_length, spec.distractor_length) for name, spec in sets.items()}
    assert lengths == {"lra": (14, 4), "lra_contour_9": (9, 3), "lra_contour_6": (6, 2)}


@pytest.mark.parametrize("size", [32, 64])
def test_the_smaller_tasks_train_with_their_own_dashes(device, config, tmp_path, size):
    train(
        config,
        tmp_path,
        "--image_size",
        size,
        curriculum=f"{size}:4:2:1:2",
    )
    assert json.loads((tmp_path / "all_results.json").read_text())["task"] == f"pathfinder-{size}"
    state = json.loads((tmp_path / "checkpoint" / "trainer_state.json").read_text())
    assert state["arguments"]["image_size"] == size


def test_wrong_models_and_files_are_refused(config, images_file, tmp_path):
    model = create_model(32, config)
    for change, message in (
        ({"vocab_size": 319}, "vocab_size is 319"),
        ({"num_labels": 3}, "3 labels"),
        ({"position_embedding_type": "absolute", "max_position_embeddings": 512}, "512"),
        ({"block_sparse": {"pattern": "grid_2d", "radius": 1, "height": 64, "width": 64}}, "64 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fits(type(model.config)(**{**TINY, **change}), 32)
    with pytest.raises(ValueError, match="multiple of the 8-pixel tile"):
        check_fits(model.config, 36)
    model.save_pretrained(tmp_path / "model")
    bad = tmp_path / "bad.npz"
    bad.write_bytes(images_file.read_bytes()[:100])
    with pytest.raises(SystemExit, match="bad.npz"):
        run("--model_name_or_path", tmp_path / "model", "--images_file", bad, "--output_dir", tmp_path / "out")
    with pytest.raises(SystemExit, match="cannot create --output_dir"):
        run("--model_name_or_path", tmp_path / "model", "--output_dir", images_file / "below_a_file")
