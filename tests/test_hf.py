# SPDX-License-Identifier: Apache-2.0
"""Hugging Face BERT and GPT-2 on the kernels give what they give without: outputs, gradients, generation, training."""

import pytest
import torch
from tiny_models import (
    LENGTH,
    MODELS,
    SPARSE,
    VOCABULARY,
    assert_all_same,
    assert_same,
    bert_config,
    gpt2_config,
    padding,
    sparse_mask,
    token_ids,
    triplet,
)
from transformers import BertLMHeadModel, GPT2LMHeadModel

from flash_models import hf, patch


@pytest.mark.filterwarnings("ignore:flash_models uses PyTorch")  # for holes; see test_hf_fallback.py
@pytest.mark.parametrize("padded", ["none", "full", "right", "left", "both", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient(device, name, padded, monkeypatch):
    if padded != "holes":
        monkeypatch.setenv("FLASH_MODELS_STRICT", "1")
    ids, mask = token_ids(device), padding(padded, device)
    valid = torch.ones_like(ids) if mask is None else mask
    results = []
    for model in triplet(MODELS[name](), device):
        logits = model(ids, attention_mask=mask).logits * valid[..., None]
        (logits.float().square().sum() / valid.sum()).backward()
        results.append({"logits": logits, **{key: weight.grad for key, weight in model.named_parameters()}})
    assert_all_same(*results)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_padding_alone(device, name, strict):
    """Such a row gives finite numbers, and neither outputs nor gradients of the others notice it."""
    ids, mask = token_ids(device), padding("right", device)
    results = []
    for model, rows in zip(triplet(MODELS[name](), device), (3, 2, 2), strict=True):
        visible = mask[:rows] if rows == 2 else torch.cat([mask[:2], torch.zeros_like(mask[2:])])
        logits = model(ids[:rows], attention_mask=visible).logits
        assert logits.isfinite().all()
        logits = logits[:2] * mask[:2, :, None]
        (logits.float().square().sum() / mask[:2].sum()).backward()
        results.append({"logits": logits, **{key: weight.grad for key, weight in model.named_parameters()}})
    assert_all_same(*results)


def test_queries_keys_and_values_are_read_in_place(device, monkeypatch, strict):
    """No copy on the way in: the op sees views of what the projections wrote."""
    seen = []

    def attention(q, k, v, *, heads_first, **options):
        seen.append((q, k, v))
        return torch.zeros_like(q.transpose(1, 2))

    monkeypatch.setattr(hf, "attention", attention)
    patched, *_ = triplet(MODELS["gpt2"](n_layer=1), device)
    patched(token_ids(device), use_cache=False)
    patched, *_ = triplet(MODELS["bert"](num_hidden_layers=1), device)
    patched(token_ids(device))
    (q, k, v), bert = seen
    assert q.shape == k.shape == v.shape == (3, 2, LENGTH, 16)
    assert q.stride() == (LENGTH * 96, 16, 96, 1)  # inside (B, S, 3, H, D)
    assert q.data_ptr() + 2 * 32 * q.element_size() == k.data_ptr() + 32 * k.element_size() == v.data_ptr()
    assert all(t.transpose(1, 2).is_contiguous() for t in bert)


def test_greedy_generation_with_left_padding(device, strict):
    patched, plain, truth = triplet(MODELS["gpt2"](), device)
    ids, mask = token_ids(device, length=9), torch.ones(3, 9, dtype=torch.long, device=device)
    ids[0, :5], mask[0, :5] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    tokens = patched.generate(ids, **options)
    if device.type == "cpu":
        assert torch.equal(tokens, plain.generate(ids, **options))
        assert torch.equal(tokens, patched.generate(ids, use_cache=False, **options))
    # every token is the best or, in bfloat16, as good as the best
    mask = torch.cat([mask, mask.new_ones(3, 12)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = truth(tokens, attention_mask=mask, position_ids=positions).logits[:, 8:-1]
    short = logits.amax(-1) - logits.gather(-1, tokens[:, 9:, None])[..., 0]
    assert short.max() <= (1e-5 if device.type == "cpu" else 0.02)


@pytest.mark.parametrize("name", MODELS)
def test_cached_chunks_equal_one_forward(device, name, strict):
    options = {"is_decoder": True} if name == "bert" else {}
    model = BertLMHeadModel(bert_config(**options)) if name == "bert" else MODELS[name](**options)
    patched, plain, truth = triplet(model, device)
    ids = token_ids(device)
    cache, logits = None, []
    for chunk in ids.split([10, 7, 1, 3], 1):
        out = patched(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    assert_same(torch.cat(logits, 1), plain(ids).logits, truth(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_cross_attention(device, name, strict):
    if name == "bert":
        model = BertLMHeadModel(bert_config(is_decoder=True, add_cross_attention=True))
    else:
        model = GPT2LMHeadModel(gpt2_config(add_cross_attention=True))
    encoded, mask = torch.randn(3, 33, 32, device=device), padding("both", device, length=33)
    ids = token_ids(device)
    results = [
        m(ids, encoder_hidden_states=encoded.to(m.dtype), encoder_attention_mask=mask, use_cache=False).logits
        for m in triplet(model, device)
    ]
    assert_same(*results)


@pytest.mark.parametrize("padded", ["none", "right"])
def test_gpt2_made_bidirectional(device, padded, strict):
    """transformers' config.is_causal=False turns a decoder into an encoder."""
    ids, mask = token_ids(device), padding(padded, device)
    valid = torch.ones_like(ids) if mask is None else mask
    models = triplet(MODELS["gpt2"](is_causal=False), device)
    assert_same(*(model(ids, attention_mask=mask).logits * valid[..., None] for model in models))


@pytest.mark.parametrize("name", MODELS)
def test_hundred_training_steps(device, name, strict):
    """The loss curve of a patched model is that of the model, step by step."""
    torch.manual_seed(1)
    patched, plain, _ = triplet(
        MODELS[name](num_hidden_layers=1) if name == "bert" else MODELS[name](n_layer=1), device
    )
    ids = (torch.arange(40, device=device)[:, None] * 7 + torch.arange(16, device=device) * 3) % VOCABULARY
    mask = padding("right", device, 8, 16)
    losses = []
    for model in (patched.float().train(), plain.float().train()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = []
        for step in range(100):
            batch = ids[(step * 8) % 40 :][:8]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(batch, attention_mask=mask, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(torch.tensor(curve))
    assert losses[0][-1] < 0.5 * losses[0][0]
    tolerance = 1e-3 if device.type == "cpu" else 0.1
    torch.testing.assert_close(losses[0], losses[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_compiles_to_one_graph(device, name, strict):
    torch._dynamo.reset()
    # use_cache=False: the case in which transformers would make a Q x K mask while tracing
    options = {"use_cache": False} if name == "gpt2" else {}
    patched, plain, truth = triplet(MODELS[name](**options), device)
    patched.loss_type = "ForMaskedLM" if name == "bert" else "ForCausalLM"  # else transformers warns inside the graph
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(patched, fullgraph=True, backend=backend)
    ids = token_ids(device)
    for mask in (None, padding("both", device)):
        valid = torch.ones_like(ids) if mask is None else mask
        out = compiled(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        others = [model(ids, attention_mask=mask).logits for model in (plain, truth)]
        assert_same(*(logits * valid[..., None] for logits in (out.logits, *others)))
    grads = {key: weight.grad.clone() for key, weight in patched.named_parameters() if weight.grad is not None}
    patched.zero_grad()
    for mask in (None, padding("both", device)):
        patched(ids, attention_mask=mask, labels=ids).loss.backward()
    noise = 1e-6 if device.type == "cpu" else 0.02
    for key, weight in patched.named_parameters():
        torch.testing.assert_close(grads[key], weight.grad, atol=noise, rtol=noise)


def test_compiled_model_refuses_a_mask_with_holes():
    patched, *_ = triplet(MODELS["bert"](num_hidden_layers=1), torch.device("cpu"))
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="padding between valid tokens"):
        compiled(token_ids("cpu"), attention_mask=padding("holes", "cpu"))


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_draws_the_same_dropout(device, name, strict):
    dropout = {"attention_probs_dropout_prob": 0.2} if name == "bert" else {"attn_pdrop": 0.2, "use_cache": False}
    patched, *_ = triplet(MODELS[name](**dropout), device)
    ids, mask, grads = token_ids(device), padding("right", device), []
    for checkpointing in (False, True):
        if checkpointing:
            patched.gradient_checkpointing_enable()
        patched.train().zero_grad()
        torch.manual_seed(3)
        patched(ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append([weight.grad.clone() for weight in patched.parameters() if weight.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7 if device.type == "cpu" else 1e-3, rtol=1e-2)


def test_dropout_acts_in_training_only(device, strict):
    patched, *_ = triplet(MODELS["bert"](attention_probs_dropout_prob=0.5), device)
    ids = token_ids(device)
    assert torch.equal(patched(ids).logits, patched(ids).logits)
    patched.train()
    logits = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        logits.append(patched(ids).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_block_sparse_bert_is_bert_with_that_mask(device, strict):
    length = 250
    patched, plain, truth = triplet(MODELS["bert"](), device)
    patch(patched, block_sparse=SPARSE)
    ids, padded = token_ids(device, length=length), padding("right", device, length=length)
    mask = sparse_mask(length, device) & padded.bool()[:, None, None, :]
    hidden = mask.logical_not()
    others = [m(ids, attention_mask=hidden.to(m.dtype) * torch.finfo(m.dtype).min).logits for m in (plain, truth)]
    results = (patched(ids, attention_mask=padded).logits, *others)
    assert_same(*(logits * padded[..., None] for logits in results))
    assert not torch.allclose(results[0], patch(plain)(ids, attention_mask=padded).logits, atol=0.1)


def test_a_forward_waits_for_the_device_at_most_once(device, recwarn):
    if device.type != "cuda":
        pytest.skip("a CPU does not wait for itself")
    patched, *_ = triplet(MODELS["bert"](), device)
    ids, mask = token_ids(device), padding("right", device)
    patched(ids, attention_mask=mask)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        recwarn.clear()  # of the one that announces this mode
        patched(ids)
        assert not [w for w in recwarn if "synchroniz" in str(w.message)]
        patched(ids, attention_mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in recwarn if "synchroniz" in str(w.message)]) <= 1
