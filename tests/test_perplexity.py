# SPDX-License-Identifier: Apache-2.0
"""eval/perplexity.py: the same tokens for every context length, in training and in scoring; the script as a whole."""

import json
import random

import numpy as np
import perplexity
import pytest
import torch
from accelerate import Accelerator
from eval_case import WORDS, assert_same_state, fresh_accelerate, last_json, stop_at  # noqa: F401
from tasks.language_modelling import TokenBlocks, bits_per_byte, score_tokens, windows
from tasks.text_tokenizer import train_byte_pairs
from tasks.training_loop import TrainingLoop
from tiny_models import MODELS, working_dtype
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_models import FlashGPT2LMHeadModel, patch

CONFIG = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "position_embedding_type": "rotary",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
SMALL = ("--vocab_size", 300, "--stride", 8, "--tokens_per_step", 256, "--logging_steps", 2)


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A folder of ten little books, each with words of its own."""
    folder, words = tmp_path_factory.mktemp("books"), random.Random(0)
    for number in range(10):
        own = words.sample(WORDS, 6)
        lines = [" ".join(words.choice(own) for _ in range(12)) for _ in range(20)]
        (folder / f"book{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps(CONFIG))
    return path


def run(*arguments):
    return perplexity.main([str(argument) for argument in arguments])


def train(config, books, output, *arguments):
    return run("--do_train", "--config_name", config, "--train_file", books, "--output_dir", output, *SMALL, *arguments)


@pytest.mark.parametrize("length, context, stride", [(1, 8, 4), (7, 8, 4), (100, 16, 5), (64, 16, 16), (33, 32, 1)])
def test_windows_score_every_token_once_with_enough_before_it(length, context, stride):
    scored = []
    for start, first, end in windows(length, context, stride):
        assert 0 <= start <= first < end <= length and end - start <= context
        for place in range(first + 1, end + 1):
            scored.append(place)
            assert place - start >= min(place, context - stride + 1)
    assert scored == list(range(1, length + 1))


def test_scores_are_those_of_one_token_after_the_other(device):
    model = MODELS["gpt2"]().to(device)
    patch(model.to(working_dtype(device)))
    documents = [np.random.default_rng(n).integers(2, 97, size).astype(np.int32) for n, size in enumerate((41, 9, 64))]
    expected = []
    for tokens in documents:
        row = torch.tensor([1, *tokens], device=device)
        total = 0.0
        for start, first, end in windows(len(tokens), 16, 5):
            with torch.no_grad():
                chance = model(row[None, start:end]).logits[0].float().log_softmax(-1)
            total -= sum(chance[place - 1 - start, row[place]].item() for place in range(first + 1, end + 1))
        expected.append(total)
    accelerator = Accelerator()
    for budget in (16, 100):
        nll, tokens = score_tokens(model, documents, 16, 5, budget, accelerator, 1)
        assert tokens.tolist() == [41, 9, 64]
        assert nll == pytest.approx(expected, rel=1e-5 if device.type == "cpu" else 2e-2)
    assert bits_per_byte([np.log(2) * 30], 10) == pytest.approx(3)


def test_long_documents_are_counted_in_stretches(monkeypatch):
    monkeypatch.setattr("tasks.language_modelling.STRETCH", 16)
    model = patch(MODELS["gpt2"]())
    documents = [np.full(40, 5, np.int32), np.full(3, 5, np.int32)]
    nll, tokens = score_tokens(model, documents, 8, 4, 64, Accelerator(), 1)
    assert tokens.tolist() == [16, 16, 8, 3] and (nll > 0).all()


def test_every_context_length_trains_on_the_same_tokens_of_a_step():
    tokens = np.arange(1000, dtype=np.int32)
    seen = {}
    for context in (16, 32, 128):
        blocks = TokenBlocks(tokens, 128, context, 256, max_batch_tokens=64, seed=0)
        for step in range(9):
            batches = [batch for rank in (0, 1) for batch in blocks(step, rank, 2)]
            assert all(batch["input_ids"].shape[1] == context for batch in batches)
            for batch in batches:
                assert torch.equal(batch["input_ids"] + 1, batch["targets"])
            targets = torch.cat([batch["targets"].flatten() for batch in batches])
            assert len(targets) == 256 and sum(batch["num_tokens"] for batch in batches) == 256
            assert seen.setdefault(step, sorted(targets.tolist())) == sorted(targets.tolist())
    short = TokenBlocks(tokens, 128, 128, 256, max_batch_tokens=64, seed=0, short=16, short_steps=3)
    for step, length in ((0, 16), (2, 16), (3, 128)):
        batches = short(step, 0, 1)
        assert {batch["input_ids"].shape[1] for batch in batches} == {length}
        assert sum(batch["share"] * batch["targets"].numel() for batch in batches) == pytest.approx(1)
        assert sorted(torch.cat([batch["targets"].flatten() for batch in batches]).tolist()) == seen[step]
    firsts = {steps[0] % 128 for steps in seen.values()}
    assert len(firsts) > 1  # the cuts move from epoch to epoch
    for block, context, message in ((128, 48, "divide"), (512, 64, "at least 1,025")):
        with pytest.raises(ValueError, match=message):
            TokenBlocks(tokens, block, context, block, 64, seed=0)


def test_training_at_two_lengths(device, config, books, tmp_path, capsys):
    options = ("--max_length", "16,64", "--max_train_steps", 60, "--learning_rate", 1e-2)
    train(config, books, tmp_path / "out", *options)
    report = last_json(capsys)
    results = report["results"]
    assert results["16"]["num_samples"] == results["64"]["num_samples"] > 0
    assert results["16"]["train_tokens"] == results["64"]["train_tokens"] == 60 * 256
    assert "1 held-out documents: book" in results["16"]["source"]
    assert all(1 < result["perplexity"] < 100 for result in results.values())  # 300 tokens: it has learned
    assert results["64"]["ci95"][0] <= results["64"]["perplexity"] <= results["64"]["ci95"][1]
    assert [row["context"] for row in report["table"]] == [16, 64]
    assert (tmp_path / "out" / "perplexity_by_context.png").stat().st_size > 1000
    # what was saved is what was scored, and it is evaluated alone at other lengths
    book = next(path for path in books.iterdir() if path.name in results["64"]["source"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "64")
    assert type(model) is FlashGPT2LMHeadModel
    command = ("--model_name_or_path", tmp_path / "out" / "64", "--validation_file", book, "--stride", 8)
    again = run(*command, "--max_length", "16,64", "--output_dir", tmp_path / "again")
    close = 1e-6 if device.type == "cpu" else 1e-2
    assert again["results"]["64"]["perplexity"] == pytest.approx(results["64"]["perplexity"], rel=close)
    assert len(again["table"]) == 2


def test_a_stopped_run_resumes_exactly(device, config, books, tmp_path, monkeypatch):
    options = ("--max_length", 32, "--max_train_steps", 6)
    whole = train(config, books, tmp_path / "whole", *options)
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        stopped = train(config, books, tmp_path / "parts", *options)
    assert stopped["training"]["finished"] is False and stopped["results"] == {}
    resumed = train(config, books, tmp_path / "parts", *options, "--resume_from_checkpoint", tmp_path / "parts")
    assert_same_state(tmp_path / "parts", tmp_path / "whole", device)
    assert resumed["results"]["32"]["perplexity"] == pytest.approx(whole["results"]["32"]["perplexity"], rel=1e-2)


def test_a_killed_run_goes_on_from_its_last_state(device, config, books, tmp_path, monkeypatch):
    options = ("--max_length", 32, "--max_train_steps", 6, "--checkpointing_steps", 2)
    train(config, books, tmp_path / "whole", *options)

    def begin_and_die(trainer, begin=TrainingLoop._begin_step):
        begin(trainer)
        if trainer.global_step == 3:
            raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(TrainingLoop, "_begin_step", begin_and_die)
        train(config, books, tmp_path / "parts", *options)
    resume = ("--resume_from_checkpoint", tmp_path / "parts")
    resumed = train(config, books, tmp_path / "parts", *options, *resume)
    assert resumed["training"]["finished"]
    assert_same_state(tmp_path / "parts", tmp_path / "whole", device)
    log = [json.loads(line) for line in (tmp_path / "parts" / "train_log.jsonl").read_text().splitlines()]
    assert [line["global_step"] for line in log] == [2, 4, 6]
    # done is done, also for somebody with another memory and other folders
    moved = tmp_path / "moved" / books.name
    moved.parent.mkdir()
    moved.symlink_to(books)
    again = train(config, moved, tmp_path / "parts", *options, *resume, "--max_batch_tokens", 64)
    assert again["results"] == resumed["results"]


def test_a_vanilla_gpt2_is_fine_tuned_longer_than_it_was(device, books, tmp_path):
    start, text = tmp_path / "start", (books / "book0.txt").read_text()
    MODELS["gpt2"](vocab_size=300, n_positions=32).save_pretrained(start)
    train_byte_pairs([text], 300).save_pretrained(start)
    files = ("--train_file", books, "--validation_file", books / "book0.txt")
    options = (*files, "--max_length", 64, "--max_train_steps", 2, "--output_dir", tmp_path / "out")
    result = run("--do_train", "--model_name_or_path", start, *SMALL, *options)["results"]["64"]
    assert result["num_samples"] > 64
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "gpt2" and model.config.n_positions == 64


def test_byte_pairs_spell_everything():
    tokenizer = train_byte_pairs(["sun and rain " * 50], 300)
    text = "sun, ☀ and\n rain\t<unk>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300 and tokenizer.eos_token == "<|endoftext|>"
    assert "<|endoftext|>" not in tokenizer.tokenize("sun and rain")


def test_a_new_tokenizer_is_kept(config, books, tmp_path):
    train(config, books, tmp_path, "--max_length", 32, "--max_train_steps", 1)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab()
    assert saved.model_max_length == 32
    before = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    with pytest.raises(SystemExit, match="--resume_from_checkpoint"):
        train(config, books, tmp_path, "--vocab_size", 280, "--max_length", 32, "--max_train_steps", 1)
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == before


def test_wrong_arguments_and_texts(config, books, tmp_path):
    def refusal(*arguments):
        with pytest.raises(SystemExit) as error:
            train(config, books, tmp_path / "out", *arguments)
        return str(error.value)

    assert "at least 8,193" in refusal("--max_length", 4096, "--tokens_per_step", 4096)
    for content, message in (('{"model_type": "bert"}', "of another family"), ("{", "is no JSON")):
        (tmp_path / "bad.json").write_text(content)
        assert message in refusal("--config_name", tmp_path / "bad.json", "--max_length", 16)
    assert "one document" in refusal("--train_file", books / "book0.txt", "--max_length", 16)
    assert "no_such" in refusal("--train_file", tmp_path / "no_such", "--max_length", 16)
    for wrong in (
        ("--stride", 99, "--max_length", 64),
        ("--tokens_per_step", 100),
        ("--push_to_hub",),
        ("--seed", "x"),
    ):
        assert refusal(*wrong) == "2"
