# SPDX-License-Identifier: Apache-2.0
"""A saved checkpoint loads with `trust_remote_code=True` in a program that has never imported this library."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from tiny_models import SIZES, gpt2_config

import flash_models
from flash_models import (
    FlashBertConfig,
    FlashBertForMaskedLM,
    FlashGPT2Config,
    FlashGPT2DoubleHeadsModel,
    FlashGPT2LMHeadModel,
)

MODELS = {
    "bert": (FlashBertForMaskedLM, FlashBertConfig(**SIZES, position_embedding_type="rotary")),
    "gpt2": (FlashGPT2LMHeadModel, FlashGPT2Config(**gpt2_config().to_dict())),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, (model_class, config) in MODELS.items():
        model_class(config).save_pretrained(folder / name)
    return folder


def run(code, folder, installed=True):
    """Run `code` offline in a Python of its own; the error output, and whether it ended well."""
    hide = "" if installed else "import sys; sys.modules['flash_models'] = None\n"
    package = str(Path(flash_models.__file__).parent.parent)
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": package}
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", hide + code], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.stderr, done.returncode == 0


def stub_names(stub):
    (tried,) = ast.parse(stub.read_text()).body
    return {alias.name for node in tried.body for alias in node.names}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_holds_the_stub(name, checkpoints):
    folder = checkpoints / name
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert [path.name for path in folder.glob("*.py")] == [f"modeling_flash_{name}.py"]
    names = stub_names(folder / f"modeling_flash_{name}.py")
    assert names == {reference.split(".")[1] for reference in auto_map.values()} and names <= set(flash_models.__all__)
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= auto_map.keys()
    for auto, reference in auto_map.items():
        assert reference.startswith(f"modeling_flash_{name}.") and hasattr(transformers, auto)
    compile((folder / f"modeling_flash_{name}.py").read_text(), "stub", "exec")
    assert max(map(len, (folder / f"modeling_flash_{name}.py").read_text().splitlines())) <= 120


def test_loads_without_importing_the_library(checkpoints):
    error, ok = run(
        """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
try:
    AutoModel.from_pretrained("bert", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
assert "flash_models" not in sys.modules
models = [
    AutoModelForMaskedLM.from_pretrained("bert", trust_remote_code=True),
    AutoModelForCausalLM.from_pretrained("gpt2", trust_remote_code=True),
]
import flash_models
for model, name in zip(models, ("FlashBertForMaskedLM", "FlashGPT2LMHeadModel")):
    assert type(model) is getattr(flash_models, name) and model.config._attn_implementation == "io_aware"
    model(torch.ones(1, 7, dtype=torch.long))
    model.save_pretrained("again/" + model.config.model_type)
assert type(AutoModel.from_pretrained("bert", trust_remote_code=True)) is flash_models.FlashBertModel
config = AutoConfig.from_pretrained("again/flash_bert", trust_remote_code=True)
assert type(config) is flash_models.FlashBertConfig and config.position_embedding_type == "rotary"
""",
        checkpoints,
    )
    assert ok, error
    for name in MODELS:  # the stub is still there, alone, and the same
        again = checkpoints / "again" / f"flash_{name}"
        stub = f"modeling_flash_{name}.py"
        assert [path.name for path in again.glob("*.py")] == [stub]
        assert (again / stub).read_text() == (checkpoints / name / stub).read_text()
        auto_maps = [
            json.loads((folder / "config.json").read_text())["auto_map"] for folder in (again, checkpoints / name)
        ]
        assert auto_maps[0] == auto_maps[1]


def test_without_the_package_the_error_says_what_to_install(checkpoints):
    load = "from transformers import AutoModel; AutoModel.from_pretrained('gpt2', trust_remote_code=True)"
    error, ok = run(load, checkpoints, installed=False)
    assert not ok and "ImportError" in error and "pip install flash-models" in error.splitlines()[-1]


def test_uploads_hold_the_stub(monkeypatch):
    """push_to_hub sends what save_pretrained has written; here to a list."""
    uploads = []

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        uploads.append((type(self).__name__, {path.name for path in Path(working_dir).iterdir()}))

    monkeypatch.setattr(transformers.utils.hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **kwargs: FakeRepo(repo_id))
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *a, **k: FakeCard())
    model = FlashGPT2DoubleHeadsModel(FlashGPT2Config(**gpt2_config().to_dict()))
    model.push_to_hub("somebody/gpt2-flash")
    model.config.push_to_hub("somebody/gpt2-flash")
    assert len(uploads) == 2
    for _, files in uploads:
        assert {"config.json", "modeling_flash_gpt2.py"} <= files
    assert "model.safetensors" in uploads[0][1] and "model.safetensors" not in uploads[1][1]


class FakeRepo:
    def __init__(self, repo_id):
        self.repo_id = repo_id


class FakeCard:
    def save(self, path):
        pass


def test_a_subclass_of_a_config_is_somebody_elses_code(tmp_path):
    class OtherConfig(FlashBertConfig):
        model_type = "other_bert"

    OtherConfig(**SIZES).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    OtherConfig.register_for_auto_class()
    assert OtherConfig._auto_class == "AutoConfig" and FlashBertConfig._auto_class is None
    FlashBertConfig.register_for_auto_class()
    assert FlashBertConfig._auto_class is None
