# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of this project, and what must hold of a folder before it is published."""

import json
from dataclasses import dataclass
from pathlib import Path

import transformers
from safetensors import SafetensorError, safe_open

from . import models

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".msgpack", ".h5"}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that the project ships in model_cards/<name>, made by eval/recipes/<name>.sh."""

    name: str
    title: str
    task: str
    pipeline_tag: str
    license: str
    max_tokens: int
    script: str

    @property
    def folder(self):
        return f"model_cards/{self.name}"


CHECKPOINTS = {
    checkpoint.name: checkpoint
    for checkpoint in (
        Checkpoint(
            name="pathx-16k-flash",
            title="Path-X",
            task="are the two markers of a 128 x 128 Pathfinder image on one curve? One token a pixel",
            pipeline_tag="image-classification",
            license="apache-2.0",
            max_tokens=16_448,
            script="eval/pathx.py",
        ),
        Checkpoint(
            name="path256-64k-flash",
            title="Path-256",
            task="are the two markers of a 256 x 256 Pathfinder image on one curve? One token a pixel",
            pipeline_tag="image-classification",
            license="apache-2.0",
            max_tokens=65_600,
            script="eval/path256.py",
        ),
        Checkpoint(
            name="bert-mini-16k-flash",
            title="BERT-mini for long documents",
            task="masked language modelling of English novels and court cases",
            pipeline_tag="fill-mask",
            license="cc-by-nc-sa-4.0",
            max_tokens=16_384,
            script="eval/pretrain_mlm.py",
        ),
        Checkpoint(
            name="ecthr-16k-flash",
            title="ECtHR",
            task="which articles of the European Convention on Human Rights did the court find violated?",
            pipeline_tag="text-classification",
            license="cc-by-nc-sa-4.0",
            max_tokens=16_384,
            script="eval/long_document.py",
        ),
        Checkpoint(
            name="gpt2-mini-8k-flash",
            title="GPT-2-mini",
            task="language modelling of English novels",
            pipeline_tag="text-generation",
            license="apache-2.0",
            max_tokens=8192,
            script="eval/perplexity.py",
        ),
    )
}


def read_json(path, what):
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {what} {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{what} {path} holds no JSON object")
    return content


def _weight_files(folder):
    if not (folder / INDEX).is_file():
        return ["model.safetensors"]
    weight_map = read_json(folder / INDEX, "the weight index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map; save the model again")
    return sorted(set(weight_map.values()))


def check_folder(folder):
    """The files of the checkpoint in `folder`, as sorted relative paths, if it may be published; else ValueError.

    There must be config.json, README.md and complete, readable safetensors weights that are exactly those of the
    model, and no file that runs code when it is loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    files = sorted(path.as_posix() for path in paths if not {".git", ".cache"} & set(path.parts))
    pickles = [file for file in files if Path(file).suffix.lower() in PICKLES]
    if pickles:
        raise ValueError(
            f"{', '.join(pickles)}: only safetensors weights are published, other formats can run code when they are "
            "loaded. Save the model with save_pretrained and remove these files"
        )
    for file in ("config.json", "README.md"):
        if file not in files:
            hint = "; write it with `flash-models card`" if file == "README.md" else ""
            raise ValueError(f"{folder} has no {file}{hint}")
    for file in _weight_files(folder):
        if file not in files:
            raise ValueError(f"{folder} has no {file}; the weights must be there as safetensors")
        try:
            with safe_open(folder / file, "pt") as weights:
                list(weights.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} is damaged or cut short ({error}); save the model again") from None
    _check_weights_fit(folder)
    return files


def _check_weights_fit(folder):
    """Raise ValueError unless the weights in `folder` are those that its architecture has, none more and none less."""
    head = (read_json(folder / "config.json", "the configuration").get("architectures") or ["no class"])[0]
    model_class = getattr(models, head, None) or getattr(transformers, head, None)
    if model_class is None:
        raise ValueError(
            f"config.json of {folder} names the class {head}, which neither this library nor transformers has"
        )
    _, report = model_class.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    for kind in ("missing", "mismatched", "unexpected"):
        keys = sorted(str(key) for key in report[f"{kind}_keys"])
        if keys:
            names = ", ".join(keys[:5]) + (" and more" if len(keys) > 5 else "")
            raise ValueError(f"the weights in {folder} do not fit {head}: {kind} {names}; save the model again")
