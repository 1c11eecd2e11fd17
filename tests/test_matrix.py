# SPDX-License-Identifier: Apache-2.0
"""Every head of BERT and GPT-2 in every way it can be called: patched, it gives what it gave before.

The table of the README comes from here: `pytest tests/test_matrix.py --write-matrix`, once with each version of
transformers.
"""

import copy
import pickle

import compatibility
import pytest
import torch
from head_models import HAS_CHOICES, HEADS, inputs, tensors, vanilla_model
from numerics import assert_as_accurate_as
from tiny_models import LENGTH, assert_all_same, assert_same, packed_batch, padding, token_ids, triplet

from flash_models import patch

PER_TOKEN = ("logits", "prediction_logits", "start_logits", "end_logits", "last_hidden_state")
POOLED = ("BertForNextSentencePrediction", "BertForSequenceClassification", "GPT2ForSequenceClassification")
LANGUAGE_MODELS = ("BertLMHeadModel", "GPT2LMHeadModel")


def results(output, mask):
    """The tensors of a model's output, 0 where they are of a padding token."""
    return {
        key: value * mask.view(*mask.shape, *[1] * (value.dim() - mask.dim()))
        if value.shape[: mask.dim()] == mask.shape
        else value
        for key, value in tensors(output).items()
    }


def compare(models, batch, mask=None, **options):
    mask = batch["attention_mask"] if mask is None else mask
    assert_all_same(*(results(model(**batch, **options), mask) for model in models))


def check_padding(name, device):
    for padded in ("none", "full", "right", "left", "both"):
        batch, labelled = inputs(name, device, padded)
        mask = batch["attention_mask"]
        if padded == "none":
            del batch["attention_mask"], labelled["attention_mask"]
        models = triplet(vanilla_model(name), device)
        compare(models, batch, mask)
        if HEADS[name][1]:
            assert_same(*(model(**labelled).loss for model in models))


def check_4d_mask(name, device):
    models = triplet(vanilla_model(name), device)
    batch, _ = inputs(name, device, "full")
    visible = torch.rand(LENGTH, LENGTH, device=device) < 0.5
    visible = (visible | torch.eye(LENGTH, dtype=torch.bool, device=device)).tril()
    mask = visible.expand(batch["input_ids"].numel() // LENGTH, 1, -1, -1)
    compare(models, {**batch, "attention_mask": mask}, batch["attention_mask"])


def check_packed(name, device):
    models = triplet(vanilla_model(name), device)
    documents, batch = packed_batch(device)
    found = tensors(models[0](**batch))
    alone = [[tensors(model(document)) for document in documents] for model in models[1:]]
    names = [key for key in PER_TOKEN if key in found]
    assert names
    for key in names:
        assert_same(found[key], *(torch.cat([output[key] for output in outputs], 1) for outputs in alone))


def check_cross_attention(name, device):
    options = {"is_decoder": True} if name.startswith("Bert") else {}
    models = triplet(vanilla_model(name, add_cross_attention=True, **options), device)
    encoded, mask = torch.randn(3, 33, 32, device=device), padding("both", device, length=33)
    batch, _ = inputs(name, device)
    outputs = [
        results(
            model(**batch, encoder_hidden_states=encoded.to(model.dtype), encoder_attention_mask=mask),
            batch["attention_mask"],
        )
        for model in models
    ]
    assert_all_same(*outputs)


def check_cache(name, device):
    models = triplet(vanilla_model(name, **({"is_decoder": True} if name.startswith("Bert") else {})), device)
    ids, cache, found = token_ids(device), None, []
    key = "last_hidden_state" if name.endswith("2Model") or name == "BertModel" else "logits"
    for chunk in ids.split([10, 7, 1, 3], 1):
        output = models[0](chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output[key])
    assert_same(torch.cat(found, 1), *(model(ids)[key] for model in models[1:]))


GENERATION = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 8},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": True},
    "chunked prefill": {"prefill_chunk_size": 4},
}


def check_generate(name, device):
    if device.type != "cpu":
        pytest.skip("bfloat16 decides ties in its own way; test_hf.py compares what is generated on a GPU")
    vanilla = vanilla_model(name)
    patched = patch(copy.deepcopy(vanilla))
    for way, options in GENERATION.items():
        batch = 1 if way in ("prompt lookup", "assisted") else 3
        ids, mask = token_ids(batch=batch, length=11), torch.ones(batch, 11, dtype=torch.long)
        if batch == 3:
            ids[0, :5], mask[0, :5] = 0, 0
        if way == "static cache" and name.startswith("Bert"):
            continue  # transformers cannot either
        found = []
        for model in (patched, vanilla):
            if way == "assisted":
                options = {"assistant_model": copy.deepcopy(model)}
            torch.manual_seed(5)
            shared = {"attention_mask": mask, "max_new_tokens": 7, "pad_token_id": 0, "do_sample": False}
            found.append(model.generate(ids, **{**shared, **options}))
        assert torch.equal(*found) and found[0].shape == (batch, 18), way


def check_checkpointing(name, device):
    patched = patch(vanilla_model(name, use_cache=False) if name.startswith("GPT2") else vanilla_model(name))
    patched, (_, labelled), grads = patched.to(device).float().train(), inputs(name, device), []
    for checkpointing in (False, True):
        if checkpointing:
            patched.gradient_checkpointing_enable()
        patched.zero_grad()
        torch.manual_seed(3)  # some heads have dropout
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            outputs = tensors(patched(**labelled))
        outputs.get("loss", next(iter(outputs.values()))).float().square().mean().backward()
        grads.append({key: w.grad.clone() for key, w in patched.named_parameters() if w.grad is not None})
    assert len(grads[0]) > 20
    noise = 0 if device.type == "cpu" else 1e-2  # the order of sums in the backward pass on a GPU
    torch.testing.assert_close(*grads, atol=noise, rtol=noise)


def check_attention_weights(name, device):
    models, (batch, _) = triplet(vanilla_model(name, attn_implementation="eager"), device), inputs(name, device)
    outputs = [model(**batch, output_attentions=True) for model in models]
    mask = batch["attention_mask"].view(-1, LENGTH)
    assert len(outputs[0].attentions) == 2
    for layer in zip(*(output.attentions for output in outputs), strict=True):
        assert_same(*(weights * mask[:, None, :, None] for weights in layer))


def check_dtypes(name, device):
    """In bfloat16, float16 and under autocast the error is at most twice that of plain PyTorch."""
    truth, (batch, _) = vanilla_model(name).to(device), inputs(name, device)
    mask = batch["attention_mask"]
    with torch.no_grad():
        expected = results(truth(**batch), mask)
        for dtype, autocast in ((torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)):
            plain = copy.deepcopy(truth) if autocast else copy.deepcopy(truth).to(dtype)
            with torch.autocast(device.type, dtype, enabled=autocast):
                found = results(patch(copy.deepcopy(plain))(**batch), mask)
                others = results(plain(**batch), mask)
            for key, value in expected.items():
                close = found[key].to(dtype), others[key].to(dtype), value
                assert_as_accurate_as(*close, name=f"{key} {dtype}", noise=1e-2)


def check_compile(name, device):
    """One graph, without and with a padding mask."""
    torch._dynamo.reset()
    one_layer = {"num_hidden_layers": 1} if name.startswith("Bert") else {"n_layer": 1}
    models = triplet(vanilla_model(name, **one_layer), device)
    compiled = torch.compile(models[0], fullgraph=True, backend="eager")
    batch, _ = inputs(name, device)
    mask = batch["attention_mask"]
    compare((compiled, *models[1:]), {"input_ids": batch["input_ids"]}, torch.ones_like(mask))
    compare((compiled, *models[1:]), batch)


def check_copies(name, device, folder):
    """deepcopy, pickle, and shards on the disk loaded with a device_map: bit by bit the same."""
    patched, (batch, _) = patch(vanilla_model(name)).to(device, torch.bfloat16), inputs(name, device)
    expected = results(patched(**batch), batch["attention_mask"])
    patched.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 2
    loaded = type(patched).from_pretrained(
        folder, attn_implementation="io_aware", device_map={"": device}, dtype=torch.bfloat16
    )
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched)), patch(loaded.eval())):
        found = results(other(**batch), batch["attention_mask"])
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def check_unpad(name, device):
    models = triplet(vanilla_model(name), device)
    patch(models[0], unpad=True)
    for padded in ("right", "both"):
        compare(models, inputs(name, device, padded)[0])


def check_scales(name, device):
    """GPT-2's own ways to scale the scores, and to compute them in float32, which the kernels do anyway."""
    options = {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}
    compare(triplet(vanilla_model(name, attn_implementation="eager", **options), device), inputs(name, device)[0])
    unscaled = vanilla_model(name, scale_attn_weights=False)
    compare(triplet(unscaled, device), inputs(name, device)[0])


# column of the table: (check, the classes that can be called so)
ALL, BERT = tuple(HEADS), tuple(name for name in HEADS if name.startswith("Bert"))
PATHS = {
    "padding": (check_padding, ALL),
    "4-D mask": (check_4d_mask, tuple(name for name in ALL if name != "BertForMultipleChoice")),
    "packed": (check_packed, tuple(name for name in ALL if name not in (*HAS_CHOICES, *POOLED))),
    "unpad": (check_unpad, tuple(name for name in BERT if name != "BertLMHeadModel")),
    "cross-attention": (check_cross_attention, ("BertModel", "GPT2Model", *LANGUAGE_MODELS)),
    "KV cache": (check_cache, ("BertModel", "GPT2Model", *LANGUAGE_MODELS)),
    "generate": (check_generate, LANGUAGE_MODELS),
    "checkpointing": (check_checkpointing, ALL),
    "weights out": (check_attention_weights, ALL),
    "scaling": (check_scales, tuple(name for name in ALL if name not in BERT)),
    "dtypes": (check_dtypes, ALL),
    "compile": (check_compile, ALL),
    "copies": (check_copies, ALL),
}
CASES = [(name, path) for path, (_, names) in PATHS.items() for name in names]
FALLS_BACK = ("4-D mask", "weights out", "generate")  # the last for its static cache


@pytest.mark.filterwarnings("ignore:flash_models uses PyTorch")
@pytest.mark.parametrize("name, path", CASES, ids=lambda part: part.replace(" ", "_"))
def test_patched(name, path, device, request, tmp_path, monkeypatch):
    if path not in FALLS_BACK:
        monkeypatch.setenv("FLASH_MODELS_STRICT", "1")
    check = PATHS[path][0]
    check(name, device, tmp_path) if check is check_copies else check(name, device)
    compatibility.passed(request.config, name, path)


def test_readme_shows_what_these_tests_found():
    """If not: run this file with --write-matrix, with each version of transformers."""
    found = compatibility.read()
    assert len(found) >= 2 and all(set(map(tuple, cases)) == set(CASES) for cases in found.values())
    assert compatibility.table(found, HEADS, PATHS) in compatibility.README.read_text("utf-8")
