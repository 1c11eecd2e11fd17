# SPDX-License-Identifier: Apache-2.0
"""A checkpoint goes to a Hub (a loopback server) and comes back: uploads, interruptions, refusals.

What talks to the server runs in processes of its own, because huggingface_hub reads its settings when it is imported.
"""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from hub_server import HubServer, Repo
from tiny_models import SIZES, SPARSE, token_ids

from flash_models import FlashBertConfig, FlashBertForSequenceClassification
from flash_models.cards import write_card

TOKEN = "hf_dummytokenforthetestsofthisproject"
LOAD = """
import json, sys
import flash_models, transformers
for name, revision in json.loads(sys.argv[1]):
    try:
        auto = transformers.AutoModelForSequenceClassification
        auto.from_pretrained(name, revision=revision).save_pretrained(f"{sys.argv[2]}/{revision}")
    except Exception as error:
        print(json.dumps([name, type(error).__name__, str(error)]))
"""


@pytest.fixture
def hub():
    with HubServer(TOKEN) as server:
        yield server


def command(hub, tmp_path, *arguments, token=TOKEN):
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    environment.pop("HF_TOKEN", None)
    if token:
        environment["HF_TOKEN"] = token
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **pipes)


def upload(hub, tmp_path, *arguments, **options):
    process = command(hub, tmp_path, "-m", "flash_models", "upload", *map(str, arguments), **options)
    out, err = process.communicate(timeout=60)
    assert TOKEN not in out + err
    return process.returncode, out, err


def load(hub, tmp_path, wanted, **options):
    """Save every (name, revision) under tmp_path/loaded/<revision>; returns [name, type, message] of what failed."""
    folder = str(tmp_path / "loaded")
    process = command(hub, tmp_path, "-c", LOAD, json.dumps(wanted), folder, **options)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert TOKEN not in out + err
    return [json.loads(line) for line in out.splitlines()]


def checkpoint(folder, **save_options):
    """A FlashBert after a few steps of training, saved with its card."""
    config = FlashBertConfig(**SIZES, max_position_embeddings=128, block_sparse=SPARSE, num_labels=3)
    model = FlashBertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(token_ids(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder, **save_options)
    write_card(folder, license="apache-2.0")
    return model.eval()


def assert_equal(folder, model):
    loaded = FlashBertForSequenceClassification.from_pretrained(folder).eval()
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.block_sparse == SPARSE
    ids = token_ids()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_round_trip(hub, tmp_path):
    """Uploaded to main, then others weights to a branch: each comes back by its id and revision."""
    models = {"main": checkpoint(tmp_path / "first"), "v2": checkpoint(tmp_path / "second")}
    (tmp_path / "first" / ".cache").mkdir()
    (tmp_path / "first" / ".cache" / "notes").write_text("not to be published")
    code, out, err = upload(hub, tmp_path, tmp_path / "first", "me/tiny-flash", "--private")
    assert code == 0, err
    repo = hub.repos["me/tiny-flash"]
    assert repo.private and out.strip() == f"{hub.endpoint}/me/tiny-flash/commit/{repo.refs['main']}"
    assert set(repo.commits[repo.refs["main"]]) == {
        path.name for path in (tmp_path / "first").iterdir() if path.name != ".cache"
    }
    code, out, err = upload(hub, tmp_path, tmp_path / "second", "me/tiny-flash", "--revision", "v2")
    assert code == 0, err
    assert load(hub, tmp_path, [("me/tiny-flash", "main"), ("me/tiny-flash", "v2")]) == []
    for revision, model in models.items():
        assert_equal(tmp_path / "loaded" / revision, model)


PUSH = """
import sys
import flash_models, huggingface_hub
model = flash_models.FlashBertForSequenceClassification.from_pretrained(sys.argv[1])
model.push_to_hub("me/pushed", commit_message="as any model", private=True, tags=["flash-models"])
huggingface_hub.HfApi().create_tag("me/pushed", tag="v1")
model.classifier.bias.data += 1
model.push_to_hub("me/pushed")
"""


def test_push_to_hub_and_tags(hub, tmp_path):
    """The model's own method: with the stub for trust_remote_code, and an older version by its tag."""
    model = checkpoint(tmp_path / "model")
    _, err = (process := command(hub, tmp_path, "-c", PUSH, str(tmp_path / "model"))).communicate(timeout=60)
    assert process.returncode == 0, err
    published = hub.repos["me/pushed"].commits[hub.repos["me/pushed"].refs["main"]]
    assert {"config.json", "model.safetensors", "modeling_flash_bert.py", "README.md"} <= set(published)
    assert json.loads(published["config.json"])["auto_map"]["AutoModel"] == "modeling_flash_bert.FlashBertModel"
    assert load(hub, tmp_path, [("me/pushed", "v1"), ("me/pushed", "main")]) == []
    assert_equal(tmp_path / "loaded" / "v1", model)
    with torch.no_grad():
        model.classifier.bias += 1
    assert_equal(tmp_path / "loaded" / "main", model)


def test_hf_upload(hub, tmp_path):
    """The command of huggingface_hub on the folder, as its documentation has it."""
    model = checkpoint(tmp_path / "model")
    main = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()"
    arguments = ["upload", "me/tiny-flash", str(tmp_path / "model"), ".", "--commit-message", "first"]
    _, err = (process := command(hub, tmp_path, "-c", main, *arguments)).communicate(timeout=60)
    assert process.returncode == 0, err
    assert load(hub, tmp_path, [("me/tiny-flash", "main")]) == []
    assert_equal(tmp_path / "loaded" / "main", model)


def test_an_upload_that_is_killed_is_continued(hub, tmp_path):
    """One of two weight files has arrived when the client dies: nothing is published, and the rest follows later."""
    model = checkpoint(tmp_path / "model", max_shard_size="40KB")
    received, process = threading.Event(), None

    def kill_after_one_file(oid, handler):
        if not received.is_set() and not hub.lfs:
            received.set()
            return False
        for _ in range(500):
            if hub.lfs:
                break
            threading.Event().wait(0.01)
        process.kill()
        return True

    hub.before_put = kill_after_one_file
    process = command(hub, tmp_path, "-m", "flash_models", "upload", str(tmp_path / "model"), "me/tiny-flash")
    process.communicate(timeout=60)
    assert process.returncode != 0
    repo = hub.repos["me/tiny-flash"]
    assert list(repo.commits.values()) == [{}] and len(hub.lfs) == 1
    kept = set(hub.lfs)
    hub.before_put, hub.puts = None, []
    code, _, err = upload(hub, tmp_path, tmp_path / "model", "me/tiny-flash")
    assert code == 0, err
    assert not kept & set(hub.puts)  # what had arrived is not sent again
    published = repo.commits[repo.refs["main"]]
    for path in (tmp_path / "model").iterdir():
        assert published[path.name] == path.read_bytes()
    assert load(hub, tmp_path, [("me/tiny-flash", "main")]) == []
    assert_equal(tmp_path / "loaded" / "main", model)


def test_a_dropped_connection_is_tried_again(hub, tmp_path):
    checkpoint(tmp_path / "model")
    hub.before_put = lambda oid, handler: len(hub.puts) == 1
    code, _, err = upload(hub, tmp_path, tmp_path / "model", "me/tiny-flash")
    assert code == 0, err
    repo = hub.repos["me/tiny-flash"]
    published = repo.commits[repo.refs["main"]]
    assert len(hub.puts) == 2
    assert published["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()


def test_refusals_to_load_are_readable(hub, tmp_path):
    hub.repos |= {"me/secret": Repo(private=True), "me/gated": Repo(gated=True), "me/open": Repo()}
    wanted = [("me/nowhere", "main"), ("me/gated", "main"), ("me/open", "no-such-branch")]
    nowhere, gated, branch = load(hub, tmp_path, wanted)
    assert nowhere[1] == "OSError" and "me/nowhere is not a local folder" in nowhere[2]
    assert gated[1] == "OSError" and "gated repo" in gated[2]
    assert branch[1] == "OSError" and "no-such-branch is not a valid git identifier" in branch[2]
    (secret,) = load(hub, tmp_path, [("me/secret", "main")], token="hf_ofsomebodyelse")
    assert secret[1] == "OSError" and "private repository" in secret[2]


def test_refusals_to_upload_are_readable(hub, tmp_path):
    checkpoint(tmp_path / "model")
    code, _, err = upload(hub, tmp_path, tmp_path / "model", "readonly/tiny-flash")
    assert code == 1 and "403" in err and "rights to create a model" in err and "Traceback" not in err
    code, _, err = upload(hub, tmp_path, tmp_path / "model", "me/tiny-flash", token=None)
    assert code == 1 and "no token for the Hub: run `hf auth login`" in err and "Traceback" not in err
    assert not hub.repos
    hub.shutdown()
    hub.server_close()
    code, _, err = upload(hub, tmp_path, tmp_path / "model", "me/tiny-flash")
    assert code == 1 and "refused" in err and "run the same command again" in err and "Traceback" not in err
