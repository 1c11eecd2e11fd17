# SPDX-License-Identifier: Apache-2.0
"""eval/long_document.py as a whole: a cold start, bad data, exact resume of a sweep, what a checkpoint carries."""

import json
import lzma
import os
import random
import signal
import subprocess
import sys

import long_document
import numpy as np
import pytest
import torch
from eval_case import assert_same_state, fresh_accelerate, last_json, save_tiny_bert, sentence, stop_at, weather  # noqa: F401
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import PushToHubMixin

from flash_models import FlashBertForSequenceClassification

SPARSE = '{"pattern": "local", "window": 64, "block_size": 64}'


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


def write_csv(path, rows):
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    return path


def write_lines(path, rows, opened=open):
    with opened(path, "wt") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def cases(count, seed=0):
    """Rows with paragraphs and the labels (none, one or both) that their words tell."""
    words, rows = random.Random(seed), []
    for number in range(count):
        labels = [[], ["sun"], ["rain"], ["sun", "rain"]][number % 4]
        facts = [sentence(words, 8, label) for label in labels] or [sentence(words, 20, "w0")]
        rows.append({"facts": facts, "violated": labels})
    return rows


def train(bert, output, *arguments):
    common = ("--do_train", "--model_name_or_path", bert, "--output_dir", output, "--learning_rate", 5e-3)
    return long_document.main([str(argument) for argument in (*common, *arguments)])


def refusal(*arguments):
    with pytest.raises(SystemExit) as error:
        train(*arguments)
    return str(error.value)


def test_cold_start_on_sixty_documents(device, bert, tmp_path, capsys):
    file = write_csv(tmp_path / "train.csv", weather(60))
    train(bert, tmp_path / "out", "--train_file", file, "--max_length", 128, "--num_train_epochs", 20)
    report = last_json(capsys)
    assert report == json.loads((tmp_path / "out" / "all_results.json").read_text())
    result = report["results"]["128"]
    assert report["training"]["finished"] and result["num_samples"] == 12 and "20% held out" in result["source"]
    assert result["f1"] > 0.9 and result["ci95"][0] <= result["f1"] <= result["ci95"][1]
    # it works for somebody who has only the folder, and reads more than the 64 tokens it began with
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 128
    texts = weather(40, seed=9, lengths=(70, 110))
    said = model.float()(**tokenizer([text for text, _ in texts], return_tensors="pt", padding=True, truncation=True))
    names = [model.config.id2label[int(place)] for place in said.logits.argmax(-1)]
    assert np.mean([name == label for name, (_, label) in zip(names, texts, strict=True)]) > 0.8


def test_multi_label_with_a_tuned_threshold(device, bert, tmp_path):
    sizes = {"train": 80, "dev": 40}
    files = [write_lines(tmp_path / f"{name}.jsonl.xz", cases(n, n), lzma.open) for name, n in sizes.items()]
    data = ("--train_file", files[0], "--validation_file", files[1], "--max_length", 64, "--num_train_epochs", 30)
    result = train(bert, tmp_path / "out", *data, "--unpad")["results"]["64"]
    assert result["micro_f1"] > 0.9 and set(result["per_label"]) == {"sun", "rain"} and result["num_samples"] == 40
    # a checkpoint carries its threshold: evaluated alone it scores the same, packed or padded
    command = ["--model_name_or_path", tmp_path / "out", "--validation_file", files[1], "--max_length", 64]
    again = long_document.main([*map(str, command), "--output_dir", str(tmp_path / "again")])["results"]["64"]
    assert again["threshold"] == result["threshold"] != 0.5
    assert again["micro_f1"] == pytest.approx(result["micro_f1"], abs=0 if device.type == "cpu" else 0.05)


def test_bad_lines_empty_documents_and_unknown_labels(bert, tmp_path, capsys):
    rows = cases(40)
    broken = ['{"facts": ["sun"], "violated": ["sun"]', "[1, 2]", '{"facts": ["sun"]}', '{"facts": 7, "violated": []}']
    write_lines(tmp_path / "train.jsonl", [*rows[:2], *broken, *rows[2:], {"facts": [], "violated": []}, ""])
    dev = [*cases(20, 1), {"facts": [""], "violated": ["snow"]}, {"facts": ["sun"], "violated": ["sun", "hail"]}]
    write_lines(tmp_path / "dev.jsonl", dev)
    files = ("--train_file", tmp_path / "train.jsonl", "--validation_file", tmp_path / "dev.jsonl")
    train(bert, tmp_path / "out", *files, "--max_train_steps", 3, "--max_length", 32)
    shown = capsys.readouterr()
    for line, reason in ((3, "no JSON"), (4, "a JSON list"), (5, "'violated' holds None"), (6, "'facts' holds int")):
        assert f"train.jsonl:{line}: " in shown.out and reason in shown.out
    result = json.loads(shown.out.splitlines()[-1])["results"]["32"]
    assert result["num_samples"] == 22 and result["empty_documents"] == 1
    # labels that training did not have are missed, not forgotten
    assert result["unknown_labels"] == {"snow": 1, "hail": 1}
    assert result["per_label"]["snow"] == {"f1": 0.0, "support": 1, "predicted": 0}


@pytest.mark.parametrize(
    "content, message",
    [
        ("text,label\nsun,a\nrain,a\nsnow,a\n", "all 2 documents of train.csv have the one label 'a'"),
        ("text,label\n", "holds no rows"),
        ("words,kind\nsun,a\nrain,b\n", r"none of the columns text, facts.* but 'kind', 'words'.*--text_column"),
        ("text,label\nsun\nrain\n", r"holds no rows; 2 lines cannot be read.*train.csv:2: 1 fields"),
    ],
)
def test_data_that_cannot_be_learned_from(bert, tmp_path, content, message):
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(SystemExit, match=message):
        train(bert, tmp_path / "out", "--train_file", tmp_path / "train.csv")


def test_wrong_arguments_and_models(bert, tmp_path):
    file = write_csv(tmp_path / "train.csv", weather(10))
    lists = write_lines(tmp_path / "lists.jsonl", cases(8))
    assert "one has lists" in refusal(bert, tmp_path / "out", "--train_file", file, "--validation_file", lists)
    mixed = write_lines(tmp_path / "mixed.jsonl", [*cases(4), {"facts": ["sun"], "violated": "sun"}])
    assert "mixed.jsonl:5 a single one" in refusal(bert, tmp_path / "out", "--train_file", mixed)
    none = write_lines(tmp_path / "none.jsonl", [{"text": "sun", "labels": []}] * 9)
    assert "no label at all" in refusal(bert, tmp_path / "out", "--train_file", none)
    assert "is no JSON" in refusal(bert, tmp_path / "out", "--train_file", file, "--block_sparse", "{local")
    assert "no_such.csv" in refusal(bert, tmp_path / "out", "--train_file", tmp_path / "no_such.csv")
    config = json.loads((bert / "config.json").read_text())
    (tmp_path / "other").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / "other" / name).write_bytes((bert / name).read_bytes())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    assert "is a roberta; expected bert" in refusal(tmp_path / "other", tmp_path / "out", "--train_file", file)
    with pytest.raises(SystemExit, match="no trained classifier"):
        long_document.main(
            ["--model_name_or_path", str(bert), "--validation_file", str(file), "--output_dir", str(tmp_path)]
        )
    for arguments in (("--unpad", "--attn_implementation", "sdpa"), ("--push_to_hub",), ("--max_length", "512,x")):
        assert refusal(bert, tmp_path / "out", "--train_file", file, *arguments) == "2"


def test_documents_of_200k_tokens(device, bert, tmp_path):
    words = random.Random(0)
    rows = weather(12)
    rows[3] = (sentence(words, 200_000, rows[3][1], times=9_000), rows[3][1])
    file = write_csv(tmp_path / "train.csv", rows)
    shape = ("--max_length", 2048, "--max_batch_tokens", 256, "--max_train_steps", 2, "--block_sparse", SPARSE)
    result = train(bert, tmp_path / "out", "--train_file", file, *shape)["results"]["2048"]
    assert result["left_out"] == 0 and result["num_samples"] == 2
    # the pattern is part of the checkpoint
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(model) is FlashBertForSequenceClassification and model.config.block_sparse == json.loads(SPARSE)
    assert model.config.max_position_embeddings == 2048


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_resumes_exactly(device, bert, tmp_path, monkeypatch, number):
    file = write_csv(tmp_path / "train.csv", weather(30))
    command = ("--train_file", file, "--max_length", "32,64", "--max_train_steps", 6, "--logging_steps", 2)
    whole = train(bert, tmp_path / "whole", *command)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, number, run="64")
        stopped = train(bert, tmp_path / "parts", *command)
    assert not stopped["training"]["finished"] and list(stopped["results"]) == ["32"]
    assert not (tmp_path / "parts" / "64" / "model.safetensors").exists()
    with monkeypatch.context() as patch:
        stop_at(patch, 1, run="32")  # a run that is done is not begun again
        resumed = train(bert, tmp_path / "parts", *command, "--resume_from_checkpoint", tmp_path / "parts")
    assert resumed["training"]["finished"]
    for run in ("32", "64"):
        assert_same_state(tmp_path / "parts" / run, tmp_path / "whole" / run, device)
        assert resumed["results"][run]["f1"] == pytest.approx(whole["results"][run]["f1"])
        log = (tmp_path / "parts" / run / "train_log.jsonl").read_text().splitlines()
        assert [json.loads(line)["global_step"] for line in log] == [2, 4, 6]
    assert "earlier run" in refusal(bert, tmp_path / "parts", *command)
    resume = ("--resume_from_checkpoint", tmp_path / "parts")
    assert "--weight_decay 0.01, now it is 0.5" in refusal(
        bert, tmp_path / "parts", *command, *resume, "--weight_decay", 0.5
    )


def test_a_sweep_ends_in_a_table_and_a_figure(bert, tmp_path, capsys):
    file = write_csv(tmp_path / "train.csv", weather(40))
    train(bert, tmp_path, "--train_file", file, "--max_length", "64,16", "--seed", "0,1", "--max_train_steps", 4)
    report = last_json(capsys)
    assert list(report["results"]) == ["16-seed0", "16-seed1", "64-seed0", "64-seed1"]
    assert [row["length"] for row in report["table"]] == [16, 64]
    for row in report["table"]:
        scores = [report["results"][f"{row['length']}-seed{seed}"]["micro_f1"] for seed in (0, 1)]
        assert row["micro-F1"] == f"{100 * np.mean(scores):.1f}"
    assert report["table"][0]["gain"] == "+0.0 (+0.0 to +0.0)"
    assert (tmp_path / "f1_by_length.md").read_text().count("\n") == 4
    assert (tmp_path / "f1_by_length.png").stat().st_size > 1000


def test_memory_budget_packing_and_checkpointing_do_not_change_what_is_learned(device, bert, tmp_path):
    file = write_csv(tmp_path / "train.csv", weather(24))
    command = ("--train_file", file, "--max_length", 64, "--max_train_steps", 1)
    train(bert, tmp_path / "plain", *command)
    expected = load_file(tmp_path / "plain" / "checkpoint" / "exp_avg.safetensors")
    size = max(value.abs().max() for value in expected.values())
    for name, extra in (
        ("small", ("--max_batch_tokens", 100)),
        ("packed", ("--unpad", "--max_batch_tokens", 300)),
        ("checkpointed", ("--gradient_checkpointing",)),
    ):
        train(bert, tmp_path / name, *command, *extra)
        gradients = load_file(tmp_path / name / "checkpoint" / "exp_avg.safetensors")
        for key, value in gradients.items():
            tolerance = size * (1e-5 if device.type == "cpu" else 2e-2)
            torch.testing.assert_close(value, expected[key], rtol=0, atol=tolerance.item(), msg=f"{name} {key}")


def test_two_processes_learn_what_one_does(bert, tmp_path):
    file = write_csv(tmp_path / "train.csv", weather(24))
    command = ["--train_file", file, "--max_length", 64, "--max_train_steps", 1, "--unpad", "--max_batch_tokens", 100]
    # no GPU is visible: of one GPU, a process that has number 1 would ask for number 1
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for processes, batch_size in ((1, 8), (2, 4)):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        script = [long_document.__file__, "--do_train", "--model_name_or_path", bert, *command]
        script += ["--output_dir", tmp_path / str(processes), "--per_device_train_batch_size", batch_size]
        whole = [str(part) for part in (*launch, *script, "--learning_rate", 5e-3)]
        ended = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads((tmp_path / "2" / "all_results.json").read_text())["num_processes"] == 2
    expected = load_file(tmp_path / "1" / "checkpoint" / "exp_avg.safetensors")
    size = max(value.abs().max() for value in expected.values())
    for key, value in load_file(tmp_path / "2" / "checkpoint" / "exp_avg.safetensors").items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5 * size.item(), msg=key)


def test_push_to_hub(bert, tmp_path, monkeypatch):
    pushed = []
    for owner in (PushToHubMixin, PreTrainedModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(owner, "push_to_hub", lambda part, name, token: pushed.append((part, name, token)))
    file = write_csv(tmp_path / "train.csv", weather(10))
    hub = ("--push_to_hub", "--hub_model_id", "me/mine", "--hub_token", "secret")
    train(bert, tmp_path / "out", "--train_file", file, "--max_train_steps", 1, *hub)
    assert [(name, token) for _, name, token in pushed] == [("me/mine", "secret")] * 2
    assert not [file for file in (tmp_path / "out").glob("*.json") if "secret" in file.read_text()]


def test_hub_dataset_with_class_labels(bert, tmp_path):
    datasets = pytest.importorskip("datasets")

    labels = datasets.List(datasets.ClassLabel(names=["sun", "rain"]))
    features = datasets.Features({"text": datasets.List(datasets.Value("string")), "labels": labels})
    rows, folder = cases(24), tmp_path / "data"
    folder.mkdir()
    columns = {"text": [row["facts"] for row in rows], "labels": [row["violated"] for row in rows]}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    report = train(bert, tmp_path / "out", "--dataset_name", folder, "--max_train_steps", 2)
    result = report["results"]["512"]
    assert set(result["per_label"]) == {"sun", "rain"} and result["num_samples"] == 24
    wrong = refusal(bert, tmp_path / "other", "--dataset_name", folder, "--eval_split", "test")
    assert "no split 'test'" in wrong
