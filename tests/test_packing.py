# SPDX-License-Identifier: Apache-2.0
"""Documents packed into a batch of 1 do not see each other, and a BERT can leave padding out: results stay the same."""

import copy

import pytest
import torch
from tiny_models import (
    LENGTH,
    MODELS,
    SPARSE,
    VOCABULARY,
    assert_all_same,
    assert_same,
    packed_batch,
    padding,
    token_ids,
    triplet,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from flash_models import DataCollatorForPackedMaskedLM, hf, patch, unpatch
from flash_models.models import hooks

pytestmark = pytest.mark.usefixtures("strict")


def document_logits(model, documents):
    return torch.cat([model(document).logits for document in documents], 1)


@pytest.mark.parametrize("names", ["all", "position_ids"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no-cache"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_do_not_see_each_other(device, name, options, names):
    if name == "bert" and options:
        pytest.skip("an encoder has no cache")
    patched, plain, truth = triplet(MODELS[name](), device)
    documents, batch = packed_batch(device)
    if names == "position_ids":
        batch = {key: batch[key] for key in ("input_ids", "position_ids")}
    logits = patched(**batch, **options).logits
    apart = [document_logits(model, documents) for model in (plain, truth)]
    assert_same(logits, *apart)
    if name == "bert":  # transformers mixes them
        assert (truth(batch["input_ids"], position_ids=batch["position_ids"]).logits - apart[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_positions_that_pack_nothing(device, name):
    """Positions from elsewhere than 0, all the same, or of one document: the model is the model."""
    models = triplet(MODELS[name](use_cache=False) if name == "gpt2" else MODELS[name](), device)
    ids, ramp = token_ids(device, batch=1), torch.arange(LENGTH, device=device)[None]
    for positions in (ramp, ramp + 7, *([] if name == "gpt2" else [ramp * 0, ramp // 2])):
        assert_same(*(model(ids, position_ids=positions).logits for model in models))


@pytest.mark.parametrize("name", MODELS)
def test_compiled_models_keep_documents_apart(name, monkeypatch):
    """They cannot look at position_ids: PyTorch's attention takes a 4-D mask, and a warning names what to pass."""
    torch._dynamo.reset()
    monkeypatch.delenv("FLASH_MODELS_STRICT")
    monkeypatch.setattr(hf, "_warned", set())
    patched, _, truth = triplet(MODELS[name](), torch.device("cpu"))
    documents, batch = packed_batch("cpu")
    compiled = torch.compile(patched, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="not given cu_seq_lens_q"):
        logits = compiled(batch["input_ids"], position_ids=batch["position_ids"]).logits
    torch.testing.assert_close(logits, document_logits(truth, documents), atol=1e-5, rtol=1e-5)
    monkeypatch.setenv("FLASH_MODELS_STRICT", "1")
    torch.testing.assert_close(compiled(**batch).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_training_compiles_for_packed_batches_of_every_length(device, name):
    """Compiled with the first batch, and once more, for every number of tokens and documents, with the second. Losses
    and gradients are those of the padded model."""
    torch._dynamo.reset()
    patched, *others = triplet(MODELS[name](num_hidden_layers=1), device)
    counter, graphs = CompileCounterWithBackend("inductor" if device.type == "cuda" else "aot_eager"), []
    compiled = torch.compile(patch(patched, fuse=True).train(), fullgraph=True, backend=counter)
    for lengths in ([14, 21, 9], [20, 3], [17, 12, 5, 18], [11, 19], [8, 4, 13, 7, 16], [15, 6]):
        mask = torch.arange(LENGTH, device=device) < torch.tensor(lengths, device=device)[:, None]
        ids = token_ids(device, batch=len(lengths))
        labels = ids.where(mask, -100)
        labels[:, 0] = -100  # a causal model guesses it from what is before it, in a packed batch another document
        positions = torch.arange(LENGTH, device=device).expand_as(mask)
        packed = {"input_ids": ids[mask], "labels": labels[mask], "position_ids": positions[mask]}
        packed = {key: value[None] for key, value in packed.items()}
        packed |= hooks.packed_arguments(torch.tensor(lengths), device)
        padded = {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}
        losses = [model(**batch).loss for model, batch in ((compiled, packed), *((other, padded) for other in others))]
        for loss in losses:
            loss.backward()
        assert_same(*losses)
        graphs.append(counter.frame_count)
    assert graphs[1:] == graphs[1:2] * 5 and graphs[1] == 2 * graphs[0], "one for the batch, one for every batch"
    models = patched, *others
    assert_all_same(*({key: weight.grad for key, weight in model.named_parameters()} for model in models))


def test_packed_with_padding_is_an_error(device):
    patched, *_ = triplet(MODELS["bert"](), device)
    _, batch = packed_batch(device)
    mask = padding("right", device, 1)
    with pytest.raises(ValueError, match="drop the mask"):
        patched(**batch, attention_mask=mask)
    with pytest.raises(ValueError, match="a batch of 2"):
        patched(batch["input_ids"].expand(2, -1), cu_seq_lens_q=batch["cu_seq_lens_q"])


# the collator


def word_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5))]
    backend = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, "[UNK]"))
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


def test_collator_for_packed_masked_language_modelling():
    documents = [[2, *torch.randint(5, VOCABULARY, (length,)).tolist(), 3] for length in (4, 90, 1, 60)]
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": ids} for ids in documents]
    collate = DataCollatorForPackedMaskedLM(word_tokenizer(), mlm_probability=0.3)
    torch.manual_seed(1)
    batch = collate(examples)
    ids = torch.tensor(sum(documents, []))[None]
    chosen = batch["labels"] != -100
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 6, 98, 101, 163]
    assert batch["max_length_q"] == batch["max_length_k"] == 92 and "attention_mask" not in batch
    assert batch["position_ids"][0].tolist() == [i for ids in documents for i in range(len(ids))]
    assert torch.equal(batch["token_type_ids"], ids)
    assert torch.equal(batch["labels"][chosen], ids[chosen]) and 20 < chosen.sum() < 75
    assert not (chosen & (ids < 5)).any()  # never a special token
    assert torch.equal(batch["input_ids"][~chosen], ids[~chosen])
    assert 0.6 < (batch["input_ids"][chosen] == 4).float().mean() < 0.95
    # the loss is that of the documents alone
    model = MODELS["bert"]().eval()
    inputs = {name: value for name, value in batch.items() if name != "token_type_ids"}
    packed = patch(model)(**inputs).loss
    unpatch(model)
    logits = document_logits(model, batch["input_ids"].split([len(ids) for ids in documents], 1))
    expected = torch.nn.functional.cross_entropy(logits[chosen], ids[chosen])
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)


def test_collator_refuses_what_it_would_ignore():
    with pytest.raises(ValueError, match="got mlm=False.*DataCollatorWithFlattening"):
        DataCollatorForPackedMaskedLM(word_tokenizer(), mlm=False)
    with pytest.raises(ValueError, match="pad_to_multiple_of=8"):
        DataCollatorForPackedMaskedLM(word_tokenizer(), pad_to_multiple_of=8)


# unpad


def lengths_seen(model):
    """Token counts that the layers of `model` compute on, collected as it runs."""
    seen = []
    for layer in model.base_model.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    return seen


@pytest.mark.parametrize("padded", ["full", "right", "left", "both", "holes"])
def test_unpadded_bert(device, padded):
    """Also with holes in the mask, and with an input that is padding alone."""
    ids, mask = token_ids(device), padding(padded, device)
    if padded == "right":
        mask[1] = 0
    results = []
    models = triplet(MODELS["bert"](), device)
    seen = lengths_seen(patch(models[0], unpad=True))
    for model in models:
        logits = model(ids, attention_mask=mask).logits * mask[..., None]
        (logits.float().square().sum() / mask.sum()).backward()
        results.append({"logits": logits, **{key: weight.grad for key, weight in model.named_parameters()}})
    assert_all_same(*results)
    assert set(seen) == {(3, LENGTH) if padded == "full" else (1, int(mask.sum()))}


def test_unpadded_heads_see_the_padded_shape(device):
    """The pooler, also one that reads a padding token, labels and a block-sparse pattern work as ever."""
    models = triplet(BertForSequenceClassification(MODELS["bert"](num_labels=3).config), device)
    labels, ids = torch.tensor([0, 2, 1], device=device), token_ids(device, length=200)
    seen = lengths_seen(patch(models[0], unpad=True))
    for padded, shape in (("right", (1, 594)), ("left", (3, 200))):
        mask = padding(padded, device, length=200)
        assert_same(*(model(ids, attention_mask=mask, labels=labels).logits for model in models))
        assert seen[-1] == shape
    sparse = patch(MODELS["bert"]().to(device, models[1].dtype).eval(), block_sparse=SPARSE)
    unpadded = patch(copy.deepcopy(sparse), unpad=True)
    seen = lengths_seen(unpadded)
    for padded, shape in (("right", (1, 594)), ("both", (3, 200))):
        mask = padding(padded, device, length=200)
        before, after = (model(ids, attention_mask=mask).logits * mask[..., None] for model in (sparse, unpadded))
        torch.testing.assert_close(before, after, atol=1e-5 if device.type == "cpu" else 0.05, rtol=1e-2)
        assert seen[-1] == shape


def test_unpadding_steps_back():
    """Where a padded shape is asked for, and where nobody can look at the mask."""
    torch._dynamo.reset()
    model = patch(MODELS["bert"](), unpad=True).eval()
    ids, mask = token_ids(), padding("right", "cpu")
    expected, seen = model(ids, attention_mask=mask), lengths_seen(model)
    layers = model(ids, attention_mask=mask, output_hidden_states=True)
    assert [tuple(state.shape) for state in layers.hidden_states] == [(3, LENGTH, 32)] * 3
    compiled = torch.compile(model, fullgraph=True, backend="eager")(ids, attention_mask=mask)
    assert set(seen) == {(3, LENGTH)}
    for other in (layers, compiled):
        difference = (other.logits - expected.logits) * mask[..., None]
        assert difference.abs().max() < 1e-5


def test_unpad_is_for_bert_and_goes_away():
    with pytest.raises(ValueError, match="unpad=True is for BERT encoders, and GPT2LMHeadModel holds none"):
        patch(MODELS["gpt2"](), unpad=True)
    model = MODELS["bert"]()
    patch(patch(model), unpad=True)
    assert hooks.gather_tokens in model.bert.encoder._forward_pre_hooks.values()
    unpatch(model)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not module._forward_pre_hooks_with_kwargs and not module._forward_hooks_with_kwargs
