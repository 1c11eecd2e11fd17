# SPDX-License-Identifier: Apache-2.0
"""Block-sparse BERT and GPT-2 are the models with that mask: logits, generation, training, compilation, checkpoints."""

import pytest
import torch
from tiny_models import MODELS, VOCABULARY, assert_same, padding, token_ids, triplet
from transformers import AutoConfig

from flash_models import FlashBertConfig, FlashBertForMaskedLM, attention, layouts, patch

PER_HEAD = {
    "pattern": "per_head",
    "heads": [
        {"pattern": "local_global", "window": 0, "global": 64},
        {"pattern": "bigbird", "window": 0, "global": 0, "random": 1, "seed": 1},
    ],
    "block_size": 64,
}
PATTERNS = {
    "bigbird": {"pattern": "bigbird", "window": 64, "global": 64, "random": 1, "block_size": 64},
    "strided": {"pattern": "strided", "stride": 192, "block_size": 64},
    "butterfly": {"pattern": "butterfly", "block_size": 64},
    "per_head": PER_HEAD,
}
LENGTH = 500  # 8 blocks, the last cut off
POSITIONS = {"bert": {"max_position_embeddings": LENGTH}, "gpt2": {"n_positions": LENGTH, "use_cache": False}}


pytestmark = pytest.mark.usefixtures("strict")


def models(name, block_sparse, device, **options):
    patched, plain, truth = triplet(MODELS[name](**POSITIONS[name], **options), device)
    return patch(patched, block_sparse=block_sparse), plain, truth


def visible(block_sparse, length, device, *, causal=False, num_heads=2):
    """bool (1, 1 or H, length, length)."""
    whole_blocks = -(-length // block_sparse["block_size"]) * block_sparse["block_size"]
    layout = layouts.from_config(block_sparse, whole_blocks, whole_blocks, device, num_heads)
    mask = layout.token_mask()[None, :, :length, :length]
    return mask.tril() if causal else mask


def additive(mask, dtype):
    return mask.logical_not().to(dtype) * torch.finfo(dtype).min


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_masked_model(name, pattern, device):
    block_sparse = PATTERNS[pattern]
    patched, plain, truth = models(name, block_sparse, device)
    ids, padded = token_ids(device, length=LENGTH), padding("right", device, length=LENGTH)
    mask = visible(block_sparse, LENGTH, device, causal=name == "gpt2") & padded.bool()[:, None, None, :]
    assert not mask[:, :, -100].all()
    others = [model(ids, attention_mask=additive(mask, model.dtype)).logits for model in (plain, truth)]
    logits = patched(ids, attention_mask=padded).logits
    assert_same(*(result * padded[..., None] for result in (logits, *others)))


@pytest.mark.filterwarnings("ignore:flash_models uses PyTorch")
@pytest.mark.parametrize("use_cache", [False, True])
def test_gpt2_with_local_global_generates_what_the_masked_model_does(use_cache, device, monkeypatch):
    if use_cache:  # PyTorch's attention serves single queries
        monkeypatch.delenv("FLASH_MODELS_STRICT")
    block_sparse = {"pattern": "local_global", "window": 64, "global": 64, "block_size": 64}
    patched, plain, truth = models("gpt2", block_sparse, device)
    prompt, new = token_ids(device, batch=2, length=310), 20  # the last tokens open a new block
    tokens = patched.generate(prompt, max_new_tokens=new, do_sample=False, use_cache=use_cache)
    assert tokens.shape == (2, 330)
    mask = additive(visible(block_sparse, 330, device, causal=True), truth.dtype)
    if device.type == "cpu":
        expected = prompt
        for length in range(310, 330):
            logits = plain(expected, attention_mask=mask[:, :, :length, :length]).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(tokens, expected)
        assert not torch.equal(tokens, patch(plain).generate(prompt, max_new_tokens=new, do_sample=False))
    # every token is the best or, in bfloat16, as good as the best
    logits = truth(tokens, attention_mask=mask).logits[:, 309:-1]
    short = logits.amax(-1) - logits.gather(-1, tokens[:, 310:, None])[..., 0]
    assert short.max() <= (1e-5 if device.type == "cpu" else 0.05)


def test_bert_with_bigbird_trains(device):
    """Its loss falls, step by step as that of the masked model."""
    length, block_sparse = 300, {"pattern": "bigbird", "window": 0, "global": 64, "random": 1, "block_size": 64}
    patched, plain, _ = models("bert", block_sparse, device, num_hidden_layers=1, initializer_range=0.05)
    ids = (torch.arange(4, device=device)[:, None] * 7 + torch.arange(length, device=device) * 3) % VOCABULARY
    mask = additive(visible(block_sparse, length, device), torch.float32)
    assert mask.any()
    curves = []
    for model, attention_mask in ((patched.float().train(), None), (plain.float().train(), mask)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        curve = []
        for _ in range(20):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(ids, attention_mask=attention_mask, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.5 * curves[0][0]
    tolerance = 1e-4 if device.type == "cpu" else 0.05
    torch.testing.assert_close(*curves, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("pattern, dynamic", [("bigbird", None), ("per_head", None), ("bigbird", True)])
def test_compiles_to_one_graph(pattern, dynamic, device):
    torch._dynamo.reset()
    patched, *_ = models("bert", PATTERNS[pattern], device, num_hidden_layers=1)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (LENGTH, 200, 300):  # the second makes the length dynamic
        ids = token_ids(device, length=length)
        expected = patched(ids).logits
        logits = compiled(ids).logits
        torch.testing.assert_close(logits, expected, atol=1e-5 if device.type == "cpu" else 0.05, rtol=1e-2)
        logits.square().mean().backward()


def test_a_checkpoint_carries_its_pattern(tmp_path, device):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = FlashBertConfig(**sizes, vocab_size=VOCABULARY, block_sparse=PER_HEAD)
    model = FlashBertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).block_sparse == PER_HEAD
    loaded = FlashBertForMaskedLM.from_pretrained(tmp_path)
    ids = token_ids(length=300)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_patterns_that_do_not_fit_the_heads():
    three = {**PER_HEAD, "heads": PER_HEAD["heads"] + [{"pattern": "dense"}]}
    with pytest.raises(ValueError, match="3 patterns do not repeat over 2 heads"):
        patch(MODELS["gpt2"](), block_sparse=three)
    with pytest.raises(ValueError, match="3 patterns do not repeat over 4 heads"):
        FlashBertConfig(hidden_size=32, num_attention_heads=4, block_sparse=three)


def test_a_compiled_call_checks_the_lengths_of_its_layout(device):
    q, layout = torch.randn(1, 100, 4, 16, device=device), layouts.local(300, 64, block_size=64, device=device)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="the layout has 5 x 5 blocks of 64; 100 queries and 100 keys need 2 x 2"):
        compiled(q.bfloat16(), q.bfloat16(), q.bfloat16(), layout=layout)
