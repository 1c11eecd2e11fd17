# SPDX-License-Identifier: Apache-2.0
"""eval/pretrain_mlm.py: what is masked, that it learns, resumes exactly and feeds the classifier."""

import json
import random

import long_document
import numpy as np
import pretrain_mlm
import pytest
import torch
from accelerate import Accelerator
from eval_case import WORDS, assert_same_state, fresh_accelerate, last_json, stop_at, weather  # noqa: F401
from tasks.masked_modelling import MaskedBatches, MaskedLoss, cut, score_masked
from tasks.text_tokenizer import train_word_pieces
from tiny_models import MODELS
from transformers import AutoModelForMaskedLM, AutoTokenizer

from flash_models import FlashBertForMaskedLM, patch

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "position_embedding_type": "rotary",
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_pieces([" ".join(WORDS)] * 20, 120)


@pytest.fixture
def texts(tmp_path):
    """Lines of words that follow each other in a circle, so that a neighbour tells the word between."""
    words = random.Random(0)
    rows = []
    for _ in range(40):
        first, length = words.randrange(8), words.randrange(10, 150)
        rows.append({"text": " ".join(WORDS[(first + place) % 8] for place in range(length))})
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"text": ""}, {"text": "w1"}])))
    return path


def train(tmp_path, texts, output, *arguments):
    (tmp_path / "bert.json").write_text(json.dumps(CONFIG))
    common = ("--do_train", "--config_name", tmp_path / "bert.json", "--vocab_size", 60, "--train_file", texts)
    short = ("--max_length", 32, "--learning_rate", 1e-2, "--output_dir", output)
    return pretrain_mlm.main([str(argument) for argument in (*common, *short, *arguments)])


def test_pieces_hold_every_token_once(tokenizer):
    documents = [np.arange(10, 31, dtype=np.int32), np.empty(0, np.int32), np.arange(5, 7, dtype=np.int32)]
    pieces = cut(documents, tokenizer, 12)
    assert [len(piece) for piece in pieces] == [12, 12, 3, 4]
    assert all(piece[0] == tokenizer.cls_token_id and piece[-1] == tokenizer.sep_token_id for piece in pieces)
    assert np.concatenate([piece[1:-1] for piece in pieces]).tolist() == [*range(10, 31), 5, 6]


def test_masks(tokenizer):
    pieces = cut([np.random.default_rng(0).integers(5, len(tokenizer), 40_000)], tokenizer, 2_000)
    batches = MaskedBatches(pieces, tokenizer, 0.15, batch_size=4, max_batch_tokens=100_000, seed=0)
    batch = batches.collate(range(len(pieces)))
    ids, before = batch["input_ids"][0], torch.from_numpy(np.concatenate(pieces)).long()
    chosen = batch["places"]
    assert torch.equal(batch["targets"], before[chosen])
    untouched = torch.ones(len(ids), dtype=torch.bool)
    untouched[chosen] = False
    assert torch.equal(ids[untouched], before[untouched])
    assert not torch.isin(batch["targets"], torch.tensor(tokenizer.all_special_ids)).any()
    assert len(chosen) / 40_000 == pytest.approx(0.15, abs=0.01)
    assert (ids[chosen] == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (ids[chosen] == before[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.03)
    parts = batches(0, 0, 1)
    assert sum(part["num_tokens"] for part in parts) > 0
    assert parts[0]["share"] == pytest.approx(1 / sum(len(part["targets"]) for part in parts))


def test_masked_scores_do_not_mix_pieces(device, tokenizer):
    model = patch(
        MODELS["bert"](vocab_size=len(tokenizer)).to(device, torch.bfloat16 if device.type == "cuda" else None)
    )
    pieces = cut([np.arange(5, 25, dtype=np.int32)] * 3, tokenizer, 16)
    batches = MaskedBatches(pieces, tokenizer, 0.5, batch_size=4, max_batch_tokens=1_000, seed=0)
    sums = score_masked(MaskedLoss(model), batches, Accelerator())
    batch = batches.collate(batches.groups(list(range(len(pieces))))[0], torch.Generator().manual_seed(0))
    offsets, order = batch["cu_seq_lens_q"].tolist(), batches.groups(list(range(len(pieces))))[0]
    for place, (start, end) in zip(order, zip(offsets, offsets[1:], strict=False), strict=True):
        alone = model(batch["input_ids"][:, start:end].to(device)).logits[0].float().log_softmax(-1).cpu()
        inside = (batch["places"] >= start) & (batch["places"] < end)
        chance = alone[batch["places"][inside] - start, batch["targets"][inside]]
        loss, _, total = sums[place]
        assert total == inside.sum()
        assert loss == pytest.approx(-chance.sum().item(), rel=1e-4 if device.type == "cpu" else 3e-2)


def test_it_learns_and_its_model_classifies(device, texts, tmp_path, capsys):
    train(tmp_path, texts, tmp_path / "mlm", "--max_train_steps", 300, "--logging_steps", 20)
    report = last_json(capsys)
    result = report["results"]["32"]
    assert result["accuracy"] > 0.5 and result["masked_perplexity"] < 6 and result["num_samples"] > 20
    assert result["ci95"][0] <= result["accuracy"] <= result["ci95"][1]
    log = [json.loads(line) for line in (tmp_path / "mlm" / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "mlm")) is FlashBertForMaskedLM
    assert AutoTokenizer.from_pretrained(tmp_path / "mlm").model_max_length == 32
    # rotary positions take any length, so nothing is extended
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in weather(20)))
    options = ["--do_train", "--model_name_or_path", tmp_path / "mlm", "--train_file", tmp_path / "train.csv"]
    options += ["--max_length", 128, "--max_train_steps", 2, "--unpad", "--output_dir", tmp_path / "classifier"]
    assert long_document.main([str(option) for option in options])["results"]["128"]["num_samples"] == 4


def test_a_stopped_run_resumes_exactly(device, texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        stopped = train(tmp_path, texts, tmp_path / "parts", "--max_train_steps", 5)
    assert stopped["training"]["finished"] is False
    # a word-piece tokenizer is not trained the same twice, so a resumed run must find its own
    tokenizer = ("--tokenizer_name", tmp_path / "parts" / "tokenizer")
    whole = train(tmp_path, texts, tmp_path / "whole", "--max_train_steps", 5, *tokenizer)
    resume = ("--resume_from_checkpoint", tmp_path / "parts")
    resumed = train(tmp_path, texts, tmp_path / "parts", "--max_train_steps", 5, *resume)
    assert_same_state(tmp_path / "parts", tmp_path / "whole", device)
    with pytest.raises(SystemExit, match="no tokenizer in .*whole"):
        train(tmp_path, texts, tmp_path / "more", "--resume_from_checkpoint", tmp_path / "whole")
    assert resumed["results"]["32"]["num_samples"] == whole["results"]["32"]["num_samples"]


def test_wrong_arguments(texts, tmp_path):
    for wrong in (("--max_length", "32,64"), ("--attn_implementation", "sdpa"), ("--mlm_probability", 1.5)):
        with pytest.raises(SystemExit, match="2"):
            train(tmp_path, texts, tmp_path / "out", *wrong)
