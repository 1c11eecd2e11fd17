# SPDX-License-Identifier: Apache-2.0
"""The command `flash-models`: conversions, cards, and the checks before an upload."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from tiny_models import MODELS, SIZES, token_ids
from transformers import AutoModelForMaskedLM

from flash_models import FlashBertConfig, FlashBertForMaskedLM, FlashBertForSequenceClassification, FlashBertModel
from flash_models.checkpoints import CHECKPOINTS, check_folder
from flash_models.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
SPARSE_ARGUMENTS = ["--pattern", "local_global", "--window", "64", "--global", "64", "--block_size", "64"]
SPARSE = {"pattern": "local_global", "window": 64, "global": 64, "block_size": 64}


@pytest.fixture
def bert(tmp_path):
    MODELS["bert"]().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def refusal(*arguments):
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    return str(error.value)


def test_help_and_info(capsys):
    for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        assert "usage: flash-models" in capsys.readouterr().out
    main(["info"])
    out = capsys.readouterr().out
    assert "flash_models" in out and all(name in out for name in CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shipped_checkpoints_may_be_published(name):
    shipped = CHECKPOINTS[name]
    assert "README.md" in check_folder(ROOT / shipped.folder)
    config = json.loads((ROOT / shipped.folder / "config.json").read_text())
    positions = "n_positions" if config["model_type"] == "flash_gpt2" else "max_position_embeddings"
    assert config[positions] == shipped.max_tokens
    assert (ROOT / shipped.script).is_file() and (ROOT / "eval" / "recipes" / f"{name}.sh").is_file()
    report = json.loads((ROOT / "eval" / "results" / name / "all_results.json").read_text())
    assert report["model"] == shipped.folder


def test_convert_dense_keeps_the_model_type(bert, tmp_path, capsys):
    main(["convert", str(bert), str(tmp_path / "long"), "--max_length", "1024", "--method", "tile"])
    assert "BertForMaskedLM, 1,024 tokens, attention exact" in capsys.readouterr().out
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"]) == ("bert", 1024)
    old, new = (AutoModelForMaskedLM.from_pretrained(folder).eval() for folder in (bert, tmp_path / "long"))
    ids = token_ids(length=200)
    assert torch.equal(old(ids).logits, new(ids).logits)
    assert new(token_ids(batch=1, length=1024)).logits.shape[1] == 1024


def test_convert_sparse_becomes_a_model_of_this_library(bert, tmp_path):
    main(["convert", str(bert), str(tmp_path / "long"), "--max_length", "512", *SPARSE_ARGUMENTS])
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    assert (config["model_type"], config["block_sparse"]) == ("flash_bert", SPARSE)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "long").eval()
    assert type(model) is FlashBertForMaskedLM and model.config.max_position_embeddings == 512
    assert torch.isfinite(model(token_ids(batch=1, length=512)).logits).all()
    main(["convert", str(tmp_path / "long"), str(tmp_path / "longer"), "--max_length", "600"])
    config = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert (config["model_type"], config["block_sparse"]) == ("flash_bert", SPARSE)


def test_convert_with_a_pattern_for_each_head(bert, tmp_path):
    """More patterns than heads are refused before the weights are looked for."""
    heads = [{"pattern": "local", "window": 64}, {"pattern": "dense"}]
    pattern = {"pattern": "per_head", "heads": heads, "block_size": 64}
    main(["convert", str(bert), str(tmp_path / "out"), "--block_sparse", json.dumps(pattern)])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["block_sparse"] == pattern
    (bert / "model.safetensors").unlink()
    three = json.dumps({**pattern, "heads": [*heads, heads[1]]})
    assert "3 patterns do not repeat over 2 heads" in refusal(
        "convert", bert, tmp_path / "bad", "--block_sparse", three
    )
    assert "one of the two ways" in refusal("convert", bert, tmp_path / "bad", "--block_sparse", "{}", "--pattern", "x")
    assert "flash-models: " in refusal("convert", bert, tmp_path / "bad", "--block_sparse", "{")
    assert not (tmp_path / "bad").exists()


def test_convert_gpt2(tmp_path):
    MODELS["gpt2"]().save_pretrained(tmp_path / "gpt2")
    main(["convert", str(tmp_path / "gpt2"), str(tmp_path / "dense"), "--max_length", "512"])
    main(["convert", str(tmp_path / "gpt2"), str(tmp_path / "sparse"), *SPARSE_ARGUMENTS])
    read = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "sparse")}
    assert (read["dense"]["model_type"], read["dense"]["n_positions"]) == ("gpt2", 512)
    assert (read["sparse"]["model_type"], read["sparse"]["n_positions"]) == ("flash_gpt2", 256)


def test_convert_refuses(bert, tmp_path):
    assert "nothing to convert" in refusal("convert", bert, tmp_path / "out")
    assert "not an empty folder" in refusal("convert", bert, bert, "--max_length", 512)
    assert "not shrink it to 64" in refusal("convert", bert, tmp_path / "out", "--max_length", 64)
    assert "--window belong to a block-sparse" in refusal("convert", bert, tmp_path / "out", "--window", 64)
    assert "unknown block_sparse pattern" in refusal("convert", bert, tmp_path / "out", "--pattern", "spiral")
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "architectures": ["BertForJokes"]}))
    assert "names BertForJokes (bert), which convert does not know" in refusal(
        "convert", bert, tmp_path / "out", "--max_length", 512
    )
    assert not (tmp_path / "out").exists()


def pathx(folder):
    config = FlashBertConfig(**SIZES, block_sparse=SPARSE, max_position_embeddings=128)
    FlashBertForSequenceClassification(config).save_pretrained(folder)
    return folder


def results(path, accuracy, model="model_cards/pathx-16k-flash"):
    score = {"source": "test", "size": 128, "accuracy": accuracy, "ci95": [accuracy - 0.01, accuracy + 0.01]}
    report = {"task": "pathfinder-128", "model": model, "results": {"lra": {**score, "num_samples": 2000}}}
    report |= {"device": "NVIDIA H200", "dtype": "bfloat16", "versions": {"torch": "2.11.0"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report))
    return path


def test_card_takes_its_scores_from_the_file(tmp_path):
    folder = pathx(tmp_path / "model_cards" / "pathx-16k-flash")
    file = tmp_path / "eval" / "results" / "pathx-16k-flash" / "all_results.json"
    main(["card", str(folder), "--results", str(results(file, 0.9415))])
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-classification",
    )
    assert data.tags == ["flash-models", "long-context", "block-sparse"] and data.model_name == "pathx-16k-flash"
    (score,) = data.eval_results
    assert (score.metric_type, score.metric_value, score.dataset_config) == ("accuracy", 0.9415, "lra")
    assert score.metric_args == {"ci95": [0.9315, 0.9515], "num_samples": 2000}
    assert "| lra, test | Accuracy | 0.9415 | 0.9315 to 0.9515 | 2000 |" in card.text
    assert "`eval/results/pathx-16k-flash/all_results.json` (NVIDIA H200, bfloat16, torch 2.11.0)" in card.text
    assert str(tmp_path) not in card.content
    # a second time, after someone wrote into it: the words stay, the scores are those of the new file
    edited = card.content.replace("## Use", "## Limits\n\nGrey images only.\n\n## Use")
    (folder / "README.md").write_text(edited.replace("license: apache-2.0", "license: mit"))
    main(["card", str(folder), "--results", str(results(file, 0.95))])
    card = ModelCard.load(folder / "README.md")
    assert "Grey images only." in card.text and "0.9415" not in card.content and card.data.license == "mit"
    assert [score.metric_value for score in card.data.eval_results] == [0.95]
    main(["card", str(folder)])
    assert ModelCard.load(folder / "README.md").content == card.content


def test_card_fills_eval_results(tmp_path):
    """For a benchmark of the Hub, and again from the next results without naming it."""
    folder = pathx(tmp_path / "pathx-16k-flash")
    file = results(tmp_path / "all_results.json", 0.9415)
    main(["card", str(folder), "--results", str(file)])
    assert not (folder / ".eval_results").exists()
    main(["card", str(folder), "--results", str(file), "--dataset", "some-lab/pathfinder"])
    main(["card", str(folder), "--results", str(results(file, 0.95))])
    text = (folder / ".eval_results" / "pathfinder-128.yaml").read_text()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("some-lab/pathfinder", "lra", 0.95)
    assert entry.notes == "Accuracy, 2000 samples, from all_results.json"
    assert ".eval_results/pathfinder-128.yaml" in check_folder(folder)
    assert "named ORG/NAME and needs" in refusal("card", folder, "--dataset", "some-lab/pathfinder")
    assert "got 'pathfinder'" in refusal("card", folder, "--results", file, "--dataset", "pathfinder")


@pytest.mark.parametrize("metric, name, value", [("f1", "F1", 0.7), ("perplexity", "Perplexity", 20.5)])
def test_card_shows_the_interval_of_any_score(bert, tmp_path, metric, name, value):
    score = {"source": "dev", metric: value, "ci95": [value - 0.25, value + 0.25], "num_samples": 9}
    report = {"task": "long-document", "model": "bert", "results": {"8192": score}}
    (tmp_path / "all_results.json").write_text(json.dumps(report))
    main(["card", str(bert), "--results", str(tmp_path / "all_results.json"), "--license", "mit"])
    row = f"| 8192, dev | {name} | {value:.4f} | {value - 0.25:.4f} to {value + 0.25:.4f} | 9 |"
    assert row in ModelCard.load(bert / "README.md").text


def test_card_refuses(tmp_path):
    folder = pathx(tmp_path / "mine")
    assert "licence of mine is not known" in refusal("card", folder)
    assert "cannot read the configuration" in refusal("card", tmp_path)
    other = results(tmp_path / "other.json", 0.9)
    assert "holds the scores of pathx-16k-flash, not of mine" in refusal(
        "card", folder, "--license", "mit", "--results", other
    )
    other.write_text("{}")
    assert "has no scores: expected" in refusal("card", folder, "--license", "mit", "--results", other)
    assert not (folder / "README.md").exists()


def test_upload_checks_the_folder_first(tmp_path):
    folder = pathx(tmp_path / "mine")
    assert "named ORG/NAME" in refusal("upload", folder, "mine")
    assert "no README.md; write it with `flash-models card`" in refusal("upload", folder, "me/mine")
    main(["card", str(folder), "--license", "mit"])
    stub = "modeling_flash_bert.py"
    assert set(check_folder(folder)) == {"README.md", "config.json", "model.safetensors", stub}
    for name in ("pytorch_model.bin", "state/optimizer.PT", "scheduler.pkl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
        assert f"{name}: only safetensors" in refusal("upload", folder, "me/mine")
        (folder / name).unlink()
    weights = (folder / "model.safetensors").read_bytes()
    for damaged in (weights[:-100], weights[:5], b""):
        (folder / "model.safetensors").write_bytes(damaged)
        assert "damaged or cut short" in refusal("upload", folder, "me/mine")
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal("upload", folder, "me/mine")
    assert "is not a folder" in refusal("upload", tmp_path / "nowhere", "me/mine")


def test_upload_needs_all_shards_and_all_weights(tmp_path):
    folder = tmp_path / "mine"
    model = FlashBertForSequenceClassification(FlashBertConfig(**SIZES, max_position_embeddings=128))
    model.save_pretrained(folder, max_shard_size="40KB")
    main(["card", str(folder), "--license", "mit"])
    shards = [file for file in check_folder(folder) if file.endswith(".safetensors")]
    assert len(shards) > 1
    (folder / shards[0]).unlink()
    with pytest.raises(ValueError, match=f"no {shards[0]}"):
        check_folder(folder)
    FlashBertModel(model.config).save_pretrained(tmp_path / "headless")
    (tmp_path / "headless" / "README.md").write_text("# headless")
    config = tmp_path / "headless" / "config.json"
    config.write_text(config.read_text().replace("FlashBertModel", "FlashBertForSequenceClassification", 1))
    with pytest.raises(ValueError, match="do not fit FlashBertForSequenceClassification: missing"):
        check_folder(tmp_path / "headless")
