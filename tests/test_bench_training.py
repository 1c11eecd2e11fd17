# SPDX-License-Identifier: Apache-2.0
"""eval/bench_training.py and eval/loss_curve.py: rows, figures and reports on tiny models, and what is refused."""

import csv
import random
from pathlib import Path

import bench_training
import loss_curve
import pytest
import torch
from eval_case import fresh_accelerate, last_json  # noqa: F401
from tasks import training_cases
from tasks.training_cases import Case
from torch._dynamo.testing import CompileCounterWithBackend

from flash_models import fused

TINY = {"bert-mini": (32, 1, 2), "gpt2-mini": (32, 1, 2)}
COMMON = ["--device", "cpu", "--lengths", "24", "--batch_size", "3", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for module in (training_cases, bench_training):
        monkeypatch.setattr(module, "MODELS", TINY)


def run(*arguments):
    return bench_training.main([*COMMON, *map(str, arguments)])


def test_every_variant_is_timed_and_what_is_there_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # takes long and is not what is tested
    arguments = ["--models", "bert-mini", "--padding", "padded", "--output_dir", tmp_path]
    run(*arguments, "--variants", "sdpa", "eager", "sdpa_compile")
    first = last_json(capsys)
    run(*arguments)
    report = last_json(capsys)
    assert len(first["rows"]) == 3 and len(report["rows"]) == 7 and report["rows_left"] == 0
    with open(report["csv"]) as file:
        assert file.readline().startswith("# commit")
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    ours = ["flash_models", "flash_models_compile", "flash_models_sparse", "flash_models_sparse_compile"]
    assert list(rows) == ["sdpa", "eager", "sdpa_compile", *ours]
    case = Case("bert-mini", 3, 24, True)
    tokens = sum(map(case.tokens, case.batches(bench_training.BATCHES, "cpu"))) / bench_training.BATCHES
    for row in rows.values():  # one is written as an integer, the other to a hundredth, however fast the machine
        ms = float(row["ms_per_step"])
        speed = tokens / ms * 1e3
        assert float(row["tokens_per_second"]) == pytest.approx(speed, abs=0.51 + 0.0051 / ms * speed)
    assert rows["sdpa"]["ms_per_step"] == str(first["rows"][0]["ms_per_step"])
    for name in ours:
        for peer in ("eager", "sdpa", "sdpa_compile"):
            ratio = float(rows[peer]["ms_per_step"]) / float(rows[name]["ms_per_step"])
            assert float(rows[name][f"speedup_over_{peer}"]) == pytest.approx(ratio, abs=2e-3)
        assert float(rows[name]["loss"]) == pytest.approx(float(rows["sdpa"]["loss"]), rel=0.02)
    assert Path(report["csv"]).with_suffix(".png").stat().st_size > 1000
    text = Path(report["csv"]).read_text().replace("# commit", "# commit other", 1)
    Path(report["csv"]).write_text(text)
    with pytest.raises(SystemExit, match="--fresh replaces it"):
        run(*arguments)


def test_out_of_memory_is_a_row_and_time_is_kept(tmp_path, monkeypatch):
    train = bench_training.train

    def short_of_memory(case, variant, *rest):
        if variant == "sdpa":
            raise torch.OutOfMemoryError("no")
        return train(case, variant, *rest)

    monkeypatch.setattr(bench_training, "train", short_of_memory)
    options = ["--models", "gpt2-mini", "--variants", "sdpa", "flash_models", "--padding", "none"]
    rows = run(*options, "--output_dir", tmp_path / "a")
    assert [row["status"] for row in rows] == ["out of memory", "ok"] and "speedup_over_sdpa" not in rows[1]
    assert run(*options, "--output_dir", tmp_path / "b", "--max_minutes", "0") == []
    monkeypatch.setattr(bench_training, "train", lambda *arguments: 1 / 0)
    with pytest.raises(SystemExit, match="some variants failed"):
        run(*options, "--output_dir", tmp_path / "c")
    monkeypatch.setattr(bench_training, "train", train)
    assert [row["status"] for row in run(*options, "--output_dir", tmp_path / "c")] == ["ok", "ok"]


def test_a_wrong_gradient_is_not_timed(tmp_path, monkeypatch):
    right = fused.norm._plain

    def wrong(*arguments):
        total, normal = right(*arguments)
        return total, normal if normal is None else 1.01 * normal

    monkeypatch.setattr(fused.norm, "_plain", wrong)
    with pytest.raises(SystemExit, match="not timed"):
        run("--models", "gpt2-mini", "--padding", "none", "--output_dir", tmp_path)


def test_flop_counts_what_is_needed():
    case = Case("gpt2-mini", 2, 24, False)
    (batch,) = case.batches(1, "cpu")
    weights = 12 * 32**2
    assert case.flop(batch) == 48 * 6 * (weights + 32 * 50257) + 12 * 32 * 24 * 48 / 2
    padded = Case("bert-mini", 2, 24, True)
    (batch,) = padded.batches(1, "cpu")
    lengths = batch["attention_mask"].sum(1)
    assert 6 <= lengths.min() and lengths.max() <= 24 and padded.tokens(batch) == lengths.sum()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    labels = (batch["labels"] != -100).sum().item()
    expected = 6 * weights * lengths.sum() + 12 * 32 * lengths.square().sum() + 6 * labels * 32 * (30522 + 32)
    assert padded.flop(batch) == expected.item()


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_loss_curves(tmp_path, capsys, model):
    words = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(words.choice(["sun", "rain", "snow", "wind"]) for _ in range(3000)))
    arguments = ["--device", "cpu", "--train_file", str(text), "--model", model, "--output_dir", str(tmp_path)]
    small = ["--steps", "12", "--window", "4", "--length", "16", "--batch_size", "4", "--hidden_size", "64"]
    small += ["--layers", "1", "--vocab_size", "300", "--learning_rate", "1e-2"]
    loss_curve.main([*arguments, *small, "--dropout", "0"])
    report = last_json(capsys)
    assert report["largest_difference_flash_models"] < 1e-3
    with open(report["csv"]) as file:
        assert file.readline().startswith("# commit")
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and float(rows[-1]["flash_models"]) < float(rows[0]["flash_models"]) - 1
    assert Path(report["csv"]).with_suffix(".png").stat().st_size > 1000
    report = loss_curve.main([*arguments, *small])
    assert report["largest_difference_transformers_other_seed"] > 1e-3
    with pytest.raises(SystemExit, match="one batch needs 4000"):
        loss_curve.main([*arguments, *small, "--batch_size", "4000"])


def test_a_compiled_bert_gets_no_padding_and_one_compilation_takes_every_batch():
    torch._dynamo.reset()
    case, variant, device = Case("bert-mini", 3, 24, True), "flash_models_compile", torch.device("cpu")
    batches = case.batches(bench_training.BATCHES, device)
    stock, ours = (case.build(name, device, dropout=False) for name in ("sdpa", variant))
    counter, graphs = CompileCounterWithBackend("aot_eager"), set()
    compiled, tokens = torch.compile(ours, fullgraph=True, backend=counter), []
    for batch in batches:
        fed, losses = case.feed(variant, batch), []
        tokens.append(fed["input_ids"].numel())
        assert tokens[-1] == case.tokens(batch) and "attention_mask" not in fed
        for model, given in ((stock, batch), (compiled, fed)):
            losses.append(model(**given).loss)
            losses[-1].backward()
        graphs.add(counter.frame_count)
        torch.testing.assert_close(losses[1], losses[0])
    assert len(set(tokens)) > 1 and len(graphs) == 1
    for key, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, stock.get_parameter(key).grad, atol=1e-5, rtol=1e-4)
    assert case.feed("sdpa_compile", batches[0]) is case.feed("flash_models", batches[0]) is batches[0]
    for other in (Case("gpt2-mini", 3, 24, True), Case("bert-mini", 3, 24, False)):
        (batch,) = other.batches(1, device)
        assert other.feed(variant, batch) is batch


def test_the_packed_gradients_are_verified(monkeypatch):
    case, device = Case("bert-mini", 3, 24, True), torch.device("cpu")
    assert bench_training.verify(case, "flash_models_compile", device) <= bench_training.TOLERANCE
    monkeypatch.setattr(Case, "feed", lambda self, variant, batch: {**batch, "attention_mask": None})
    with pytest.raises(SystemExit, match="not timed"):
        bench_training.verify(case, "flash_models_compile", device)


@pytest.mark.parametrize("model, padded", [("bert-mini", True), ("gpt2-mini", False)])
def test_block_sparse_gradients_are_those_under_the_mask(model, padded, monkeypatch):
    case, device = Case(model, 2, 900, padded), torch.device("cpu")
    assert bench_training.verify(case, "flash_models_sparse", device) <= bench_training.TOLERANCE
    monkeypatch.setattr(Case, "with_block_mask", lambda self, batch: batch)
    with pytest.raises(SystemExit, match="not timed"):
        bench_training.verify(case, "flash_models_sparse", device)
