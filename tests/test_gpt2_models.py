# SPDX-License-Identifier: Apache-2.0
"""FlashGPT2: positions, block sparsity, generation through the cache, training without one."""

import copy
import warnings

import pytest
import torch
from tiny_models import LENGTH, VOCABULARY, gpt2_config, packed_batch, padding, token_ids, working_dtype
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from flash_models import FlashGPT2Config, FlashGPT2ForTokenClassification, FlashGPT2LMHeadModel, FlashGPT2Model, hf

ROTARY = {"position_embedding_type": "rotary", "rotary_max_wavelength": 500.0}
LOCAL = {"block_sparse": {"pattern": "local_global", "window": 64, "global": 64, "block_size": 64}}
KINDS = {"absolute": {}, "rotary": ROTARY, "sparse": LOCAL, "sparse-rotary": {**LOCAL, **ROTARY}}
CPU = torch.device("cpu")
every_kind = pytest.mark.parametrize("kind", KINDS)


pytestmark = pytest.mark.usefixtures("strict")


def flash_config(**options):
    # to_dict leaves the attention out
    return FlashGPT2Config(**{**gpt2_config(n_positions=512).to_dict(), **options})


def language_model(device=CPU, **options):
    return FlashGPT2LMHeadModel(flash_config(**options)).to(device, working_dtype(device)).eval()


def noise(device):
    return {"atol": 1e-4, "rtol": 1e-4} if device.type == "cpu" else {"atol": 0.1, "rtol": 0.1}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"position_embedding_type": "rotary_2d"}, r"must be one of \('absolute', 'rotary'\), got 'rotary_2d'"),
        ({"position_embedding_type": "rotary", "n_embd": 6}, "head dim divisible by 2, got 3"),
        ({"block_sparse": {"pattern": "spiral"}}, "unknown block_sparse pattern 'spiral'"),
    ],
)
def test_configuration_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FlashGPT2Config(**{"n_embd": 32, "n_head": 2, **options})


def test_a_vanilla_configuration_is_an_error():
    with pytest.raises(
        TypeError, match=r"FlashGPT2Model takes a FlashGPT2Config, got GPT2Config; convert it with Flash"
    ):
        FlashGPT2Model(GPT2Config())


@pytest.mark.parametrize("kind, what", [("rotary", "rotary positions"), ("sparse", "block_sparse attention")])
def test_attention_that_would_change_the_result_is_an_error(kind, what):
    model = language_model(**KINDS[kind])
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=f"{what}.*attn_implementation='eager' would silently leave out"):
        model(token_ids())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attention_on_request(implementation, tmp_path):
    model = language_model()
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert other.config._attn_implementation == implementation
    ids = token_ids()
    torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


# positions


def test_rotary_has_no_table_uses_every_weight_and_any_length(device):
    model = language_model(device, **ROTARY, n_positions=8)
    assert not [name for name in model.state_dict() if "wpe" in name]
    ids = token_ids(device, 2, 700)
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in model.parameters())


def test_rotary_knows_order(device):
    """The last token sees the same tokens in another order: without positions nothing would change."""
    model = language_model(device, **ROTARY, n_layer=1)
    ids = token_ids(device, 1)
    swapped = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], 1)
    assert (model(ids).logits[:, -1] - model(swapped).logits[:, -1]).abs().max() > 0.05


def test_padding_on_the_left_does_not_change_a_rotary_model(device):
    model, ids = language_model(device, **ROTARY), token_ids(device)
    padded, mask = (torch.nn.functional.pad(t, (9, 0)) for t in (ids, torch.ones_like(ids)))
    out = model(padded, attention_mask=mask).logits[:, 9:]
    torch.testing.assert_close(out, model(ids).logits, **noise(device))


# the cache


@every_kind
def test_chunks_through_the_cache(kind, device, monkeypatch):
    if "sparse" in kind:  # these go to PyTorch's attention, once the cache holds more than the queries
        monkeypatch.delenv("FLASH_MODELS_STRICT")
    model, ids, cache, chunks = language_model(device, **KINDS[kind]), token_ids(device, 2, 300), None, []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for chunk in ids.split([130, 1, 90, 79], 1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            chunks.append(out.logits)
        torch.testing.assert_close(torch.cat(chunks, 1), model(ids).logits, **noise(device))
        if "sparse" in kind:
            dense = copy.deepcopy(model)
            dense.config.block_sparse = None
            assert (dense(ids).logits - model(ids).logits).abs().max() > 0.01


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "chunked-prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
@pytest.mark.parametrize("side", ["none", "left"])
def test_generate_equals_transformers(options, side, tmp_path):
    batch = 1 if "prompt_lookup_num_tokens" in options else 3
    ids, mask = token_ids(batch=batch), padding(side, "cpu")
    mask = None if mask is None else mask[-batch:] if batch == 3 else mask[1:2]
    model = language_model()
    model.save_pretrained(tmp_path)
    vanilla = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, **options}
    found, expected = model.generate(ids, **options), vanilla.generate(ids, **options)
    assert found.shape == (batch, LENGTH + 8) and torch.equal(found, expected)


@every_kind
def test_generate_with_and_without_cache(kind, monkeypatch):
    if "sparse" in kind:
        monkeypatch.delenv("FLASH_MODELS_STRICT")
        monkeypatch.setattr(hf, "_warned", set())
    model, ids = language_model(**KINDS[kind]), token_ids(batch=2, length=150)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = model.generate(ids, max_new_tokens=6, do_sample=False)
    fallbacks = [str(w.message) for w in caught if "scaled_dot_product_attention" in str(w.message)]
    assert len(fallbacks) == ("sparse" in kind) and all("key-value cache" in message for message in fallbacks)
    monkeypatch.setenv("FLASH_MODELS_STRICT", "1")
    assert torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize("kind", ["rotary", "sparse"])
def test_static_cache_is_refused_where_it_would_be_wrong(kind, monkeypatch):
    monkeypatch.delenv("FLASH_MODELS_STRICT")
    with pytest.raises(ValueError, match="static cache; use the default dynamic cache"):
        language_model(**KINDS[kind]).generate(token_ids(), max_new_tokens=2, cache_implementation="static")


# training


def test_training_keeps_no_cache():
    model, ids = language_model(), token_ids()
    assert model(ids).past_key_values is not None
    model.train()
    assert model(ids).past_key_values is None and model(ids, use_cache=True).past_key_values is not None
    assert model.config.use_cache
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.eval().generate(ids, max_new_tokens=3, do_sample=False))


@every_kind
def test_gradient_checkpointing(kind, device):
    model, ids = language_model(device, **KINDS[kind]).train(), token_ids(device, 2, 150)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([weight.grad.clone() for weight in model.parameters()])
        model.gradient_checkpointing_enable()
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["absolute", "rotary"])
def test_packed_documents(kind, device):
    model = FlashGPT2ForTokenClassification(flash_config(**KINDS[kind])).to(device, working_dtype(device)).eval()
    documents, batch = packed_batch(device)
    apart = torch.cat([model(document).logits for document in documents], 1)
    torch.testing.assert_close(model(**batch, use_cache=False).logits, apart, **noise(device))


@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize("kind", ["absolute", "sparse-rotary"])
def test_compiles_to_one_graph(kind, device):
    torch._dynamo.reset()
    model, ids = language_model(device, **KINDS[kind], n_layer=1).train(), token_ids(device, 2, 130)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device.type == "cuda" else "eager")
    grads = []
    for run in (compiled, model):
        model.zero_grad()
        out = run(ids, labels=ids)
        out.loss.backward()
        grads.append([out.logits, *(weight.grad.clone() for weight in model.parameters())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **noise(device))


def test_vocabulary_can_grow():
    model = language_model(**ROTARY)
    model.resize_token_embeddings(VOCABULARY + 3)
    assert model(token_ids()).logits.shape[-1] == VOCABULARY + 3
    assert model.lm_head.weight is model.transformer.wte.weight
