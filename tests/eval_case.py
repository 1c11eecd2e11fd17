# SPDX-License-Identifier: Apache-2.0
"""What the tests of the scripts under eval/ share: a fresh accelerate, a stop in the middle, tiny models and texts."""

import json
import os
import random
import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tasks.training_loop import TrainingLoop
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = [f"w{number}" for number in range(30)] + ["sun", "rain", "snow"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(autouse=True)
def fresh_accelerate(request, monkeypatch):
    """accelerate remembers the first device it was asked for."""
    if "device" not in request.fixturenames or request.getfixturevalue("device").type == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def last_json(capsys):
    """The object that a script printed as its last line."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def stop_at(monkeypatch, step, number=signal.SIGTERM, run=None):
    """A signal while optimizer step `step` is under way, in the folder named `run` alone if that is given."""
    begin = TrainingLoop._begin_step

    def begin_and_kill(self):
        begin(self)
        if self.global_step + 1 == step and run in (None, self.folder.name):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TrainingLoop, "_begin_step", begin_and_kill)


def assert_same_state(actual, expected, device, names=("model", "exp_avg", "exp_avg_sq")):
    """The training states in two output folders: equal on a CPU; CUDA adds gradients in any order."""
    tolerance = 0 if device.type == "cpu" else 5e-3
    for name in names:
        wanted = load_file(expected / "checkpoint" / f"{name}.safetensors")
        for key, value in load_file(actual / "checkpoint" / f"{name}.safetensors").items():
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=tolerance, msg=f"{actual.name} {name} {key}")


def save_tiny_bert(folder, **options):
    """A BertModel with 64 positions and its tokenizer of a word a token."""
    vocab = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    BertTokenizer(vocab=vocab).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    defaults = {"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocab), **{**sizes, **defaults, **options})).save_pretrained(folder)
    return folder


def sentence(words, length, key, times=3):
    """`length` random words with `key` among them, `times` times."""
    text = [words.choice(WORDS[:30]) for _ in range(length)]
    for _ in range(times):
        text.insert(words.randrange(len(text) + 1), key)
    return " ".join(text)


def weather(count, seed=0, lengths=(5, 60)):
    """[(text, one of sun, rain)], each told by its words."""
    words = random.Random(seed)
    kinds = [WORDS[30 + number % 2] for number in range(count)]
    return [(sentence(words, words.randint(*lengths), kind), kind) for kind in kinds]
