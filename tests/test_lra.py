# SPDX-License-Identifier: Apache-2.0
"""eval/lra.py as a whole: the five tasks from what is made and from files, bad files, exact resume, times."""

import csv
import itertools
import json
import random

import lra
import numpy as np
import pytest
import torch
from eval_case import assert_same_state, fresh_accelerate, last_json, stop_at  # noqa: F401
from tasks import lra_listops, lra_speed
from tasks.lra_data import read_files
from tasks.lra_tasks import TASKS
from tasks.pathx_model import create_model
from test_pathx import TINY

from flash_models import FlashBertForSequenceClassification, attention, hf

SMALL = ("--hidden_size", 32, "--num_hidden_layers", 1, "--num_attention_heads", 2, "--intermediate_size", 32)
FEW = ("--num_train_samples", 24, "--num_eval_samples", 10, "--num_workers", 1)


def run(*arguments):
    return lra.main([str(argument) for argument in arguments])


def train(task, output, *arguments):
    common = ("--task", task, "--do_train", "--output_dir", output, "--per_device_train_batch_size", 8)
    return run(*common, *SMALL, *arguments)


def refusal(task, output, *arguments):
    with pytest.raises(SystemExit) as error:
        train(task, output, *arguments)
    return str(error.value)


def reviews(count, seed=0):
    """(text, class), told by a word in lines of noise."""
    draw = random.Random(seed)
    kinds = [("good", "bad")[number % 2] for number in range(count)]
    noise = [["".join(draw.choices("abcde ", k=draw.randint(2, 20))) for _ in range(2)] for _ in kinds]
    return [(f"{before} {kind * 6} {after}", kind) for (before, after), kind in zip(noise, kinds, strict=True)]


def write_text(path, rows):
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    return path


def days_and_nights(count, seed=0):
    """uint8 (count, 32, 32) images, dark (0) or bright (1), and their labels."""
    labels = np.arange(count) % 2
    images = np.random.default_rng(seed).integers(0, 60, (count, 32, 32)) + 150 * labels[:, None, None]
    return images.astype(np.uint8), labels


@pytest.mark.parametrize("name", ["flash", "block_sparse", "standard", "sdpa", "linformer", "performer"])
def test_listops_with_every_attention_and_what_a_checkpoint_carries(name, device, tmp_path, capsys):
    few = (*FEW, "--data_cache_dir", tmp_path / "cache")
    train("listops", tmp_path / "out", "--attention", name, "--max_train_steps", 2, *few)
    report = last_json(capsys)
    assert report == json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert report["training"]["finished"] and report["attention"] == name and report["task"] == "lra-listops"
    result = report["results"]
    assert result["num_samples"] == 10 and result["ci95"][0] <= result["accuracy"] <= result["ci95"][1]
    labels = [value for _, value in (lra_listops.expression("test", number) for number in range(10))]
    assert result["largest_class"] == max(map(labels.count, labels)) / 10
    with np.load(tmp_path / "out" / "predictions_eval.npz") as file:
        assert file["references"].tolist() == labels and np.isfinite(file["scores"]).all()
    # the folder alone says what its attention is
    again = run("--task", "listops", "--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "b", *few)
    assert again["attention"] == name and again["block_sparse"] == report["block_sparse"]
    with np.load(tmp_path / "out" / "predictions_eval.npz") as one, np.load(tmp_path / "b/predictions_eval.npz") as two:
        np.testing.assert_allclose(one["scores"], two["scores"], atol=1e-3 if device.type == "cpu" else 2e-2)
    if name in ("flash", "block_sparse"):
        model = FlashBertForSequenceClassification.from_pretrained(tmp_path / "out")
        assert model.config.block_sparse == report["block_sparse"]


def test_text_of_files_is_learned(device, tmp_path):
    files = [write_text(tmp_path / f"{part}.csv", reviews(n, n)) for part, n in (("train", 64), ("test", 40))]
    options = ("--train_file", files[0], "--validation_file", files[1], "--max_length", 128, "--learning_rate", 5e-3)
    report = train("text", tmp_path / "out", *options, "--max_train_steps", 60)
    assert report["results"]["accuracy"] > 0.9 and report["results"]["largest_class"] == 0.5
    assert report["results"]["source"] == "test.csv"


def test_retrieval_of_the_released_format_is_learned(device, tmp_path):
    """The class is that of the second document. The released files have no header and bare quotes."""
    for part, count in (("train", 96), ("test", 40)):
        first, second = reviews(count, count), reviews(count, count + 1)
        random.Random(0).shuffle(first)
        pairs = zip(first, second, strict=True)
        rows = [f'{float(kind == "good")}\tid1\tid2\t{a} "quote\t{b}\n' for (a, _), (b, kind) in pairs]
        (tmp_path / f"{part}.tsv").write_text("".join(rows))
    files = ("--train_file", tmp_path / "train.tsv", "--validation_file", tmp_path / "test.tsv", "--max_length", 64)
    report = train("retrieval", tmp_path, *files, "--max_train_steps", 60, "--learning_rate", 5e-3)
    assert report["results"]["accuracy"] > 0.85
    again = run(
        "--task", "retrieval", "--model_name_or_path", tmp_path, *files[2:4], "--output_dir", tmp_path / "again"
    )
    assert again["results"]["accuracy"] == pytest.approx(report["results"]["accuracy"], abs=0.05)


def test_images_of_files_are_learned(device, tmp_path):
    images, labels = days_and_nights(32)
    np.savez(tmp_path / "train.npz", images=images, labels=labels)
    # CIFAR-10's binary version: a byte of label, then the planes of red, green and blue
    images, labels = days_and_nights(20, 1)
    planes = np.repeat(images.reshape(20, 1, -1), 3, 1).reshape(20, -1)
    (tmp_path / "test_batch.bin").write_bytes(np.concatenate((labels[:, None].astype(np.uint8), planes), 1).tobytes())
    read = read_files("image", [tmp_path / "test_batch.bin"])
    np.testing.assert_array_equal(np.stack(read.items), images)
    files = ("--train_file", tmp_path / "train.npz", "--validation_file", tmp_path / "test_batch.bin")
    report = train("image", tmp_path, *files, "--max_train_steps", 25, "--learning_rate", 5e-3)
    assert report["results"]["accuracy"] > 0.9 and report["results"]["num_samples"] == 20


def test_pathfinder_and_a_checkpoint_of_the_path_x_family(device, tmp_path):
    report = train("pathfinder", tmp_path / "out", *FEW, "--max_train_steps", 2)
    assert report["results"]["source"] == "Pathfinder-32, test" and report["results"]["num_samples"] == 10
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    create_model(32, tmp_path / "tiny.json").save_pretrained(tmp_path / "pathx")
    given = ("--model_name_or_path", tmp_path / "pathx", "--output_dir", tmp_path / "scores")
    scored = run("--task", "pathfinder", *given, *FEW)["results"]
    assert scored["num_samples"] == 10 and set(scored["per_class"]) <= {"0", "1"}


def test_a_stopped_training_resumes_exactly(device, tmp_path, monkeypatch):
    command = (*FEW, "--max_train_steps", 6, "--logging_steps", 2, "--position_embedding_type", "rotary")
    whole = train("listops", tmp_path / "whole", *command)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        stopped = train("listops", tmp_path / "parts", *command)
    assert not stopped["training"]["finished"] and stopped["training"]["steps"] == 3 and "results" not in stopped
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert "earlier run" in refusal("listops", tmp_path / "parts", *command)
    resumed = train("listops", tmp_path / "parts", *command, "--resume_from_checkpoint", tmp_path / "parts")
    assert_same_state(tmp_path / "parts", tmp_path / "whole", device)
    assert resumed["training"]["finished"] and resumed["results"]["accuracy"] == whole["results"]["accuracy"]


BAD = {  # name: (task, file name, content, message)
    "columns": ("text", "a.csv", "words,label\nx,1\n", r"a.csv has the columns \['label', 'words'\]; text needs"),
    "no rows": ("text", "a.jsonl", "{\n", "holds no rows"),
    "no text": ("text", "a.jsonl", '{"text": 3, "label": "1"}\n', "no text example.*holds int; expected text"),
    "no label": ("text", "a.jsonl", '{"text": "x", "label": null}\n', "holds None; expected a class"),
    "one class": ("text", "a.csv", "text,label\nx,1\ny,1\n", "all 2 examples of a.csv are of the class '1'"),
    "no pairs": ("retrieval", "a.tsv", "1\tonly\n", "holds no rows.*2 fields; the header names 5"),
    "word": ("listops", "a.tsv", "Source\tTarget\n[MAX 3 x ]\t3\n", "'x' is no part of a ListOps expression"),
    "open list": ("listops", "a.tsv", "Source\tTarget\n[MAX 3 4\t4\n", "1 lists are not closed"),
    "value": ("listops", "a.tsv", "Source\tTarget\n[MAX 3 4 ]\t12\n", "class '12' is none of listops: 0, 1"),
    "no npz": ("image", "a.npz", "images", "is no npz file with arrays"),
    "cut short": ("image", "a.bin", "x" * 100, "has 100 bytes; CIFAR-10's binary files have 3073 an image"),
    "ending": ("text", "a.pdf", "x", r"ends in '.pdf'; expected one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path, capsys):
    task, file, content, message = BAD[name]
    (tmp_path / file).write_text(content)
    files = ("--train_file", tmp_path / file, "--validation_file", tmp_path / file)
    with pytest.raises(SystemExit, match=message):
        train(task, tmp_path / "out", *files)


def test_images_and_classes_that_do_not_fit(tmp_path):
    images, labels = days_and_nights(8)
    for number, (shape, names, message) in enumerate(
        [
            (images[:, :16], labels, r"images are uint8 \(8, 16, 32\)"),
            (images.astype(np.float32), labels, "images are float32"),
            (images, labels[:5], "labels must be 8 whole numbers from 0 to 9"),
            (images, labels + 9, "labels must be 8 whole numbers from 0 to 9"),
        ]
    ):
        path = tmp_path / f"{number}.npz"
        np.savez(path, images=shape, labels=names)
        with pytest.raises(SystemExit, match=message):
            train("image", tmp_path / "out", "--train_file", path, "--validation_file", path)
    files = [write_text(tmp_path / f"{n}.csv", rows) for n, rows in (("a", reviews(8)), ("b", [("x", "ugly")]))]
    text = refusal(
        "text", tmp_path / "c", "--train_file", files[0], "--validation_file", files[1], "--max_train_steps", 1
    )
    assert "b.csv has the class 'ugly'; the model knows bad, good" in text


def test_wrong_arguments(tmp_path):
    for arguments in (("--task", "text"), ("--speed", "--dropout", "1"), ("--speed", "--max_length", "2")):
        with pytest.raises(SystemExit, match="2"):
            run(*arguments)
    assert refusal("listops", tmp_path, "--attention", "flash", "sdpa") == "2"
    assert refusal("text", tmp_path, "--train_file", tmp_path / "a.csv") == "2"
    assert "retrieval needs --validation_file" in refusal("retrieval", tmp_path)
    rotary = refusal("listops", tmp_path, *FEW, "--attention", "sdpa", "--position_embedding_type", "rotary")
    assert "sdpa would leave them out" in rotary
    assert "no split 'dev'" in refusal("listops", tmp_path, *FEW, "--eval_split", "dev")


def test_attentions_are_timed_against_the_standard_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lra_speed, "QUICK_LENGTH", 128)
    names = ("standard", "flash", "linformer")
    for task in ("retrieval", "image"):  # the second call adds to the table of the first
        run("--speed", "--quick", "--task", task, "--attention", *names, "--output_dir", tmp_path)
    report = last_json(capsys)
    with open(report["csv"]) as file:
        assert file.readline().startswith("# commit")
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["attention"]) for row in rows] == list(itertools.product(("retrieval", "image"), names))
    assert {row["tokens"] for row in rows} == {"128"}
    means = report["speedup_over_standard"]["eager"]
    for row in rows:
        standard = next(r for r in rows if (r["task"], r["attention"]) == (row["task"], "standard"))
        ratio = float(standard["ms"]) / float(row["ms"])
        assert float(row["speedup_over_standard"]) == pytest.approx(ratio, abs=2e-3)
        assert means[row["attention"]][row["task"]] == float(row["speedup_over_standard"])
    flash = means["flash"]
    assert flash["geomean"] == pytest.approx((flash["retrieval"] * flash["image"]) ** 0.5, abs=2e-3)
    assert (tmp_path / report["csv"]).with_suffix(".png").stat().st_size > 1000
    assert [TASKS[name].speed_length for name in TASKS] == [2048, 4096, 4096, 1024, 1024]
    with open(report["csv"]) as file:
        table = file.read().replace("# commit", "# commit other")  # of other conditions
    (tmp_path / "other.csv").write_text(table)
    assert lra_speed.earlier_rows(tmp_path / "other.csv", {"commit": "this"}, []) == []


def test_a_wrong_attention_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "attention", lambda q, k, v, layout, **options: attention(q, k, v, **options))
    with pytest.raises(SystemExit, match="image: the error of block_sparse"):
        run("--speed", "--quick", "--task", "image", "--attention", "block_sparse", "--output_dir", tmp_path)


def test_the_steps_of_the_compared_attentions_differ_in_attention_alone():
    args = lra.parse_args(["--speed", "--quick"])
    models = {name: lra_speed.build("image", name, 256, args, torch.device("cpu")) for name in lra.ATTENTIONS}
    weights = {name: value for name, value in models["standard"].named_parameters() if value.requires_grad}
    for name, model in models.items():
        own = {key: value for key, value in model.named_parameters() if value.requires_grad}
        extra = {key for key in own.keys() - weights.keys()}
        assert all("linformer_projection" in key for key in extra) and bool(extra) == (name == "linformer")
        assert weights.keys() <= own.keys()
        assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.1
