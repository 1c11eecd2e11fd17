# SPDX-License-Identifier: Apache-2.0
"""What the kernels do not take is right all the same, is named once, and is an error in strict mode."""

import itertools

import pytest
import torch
from tiny_models import LENGTH, MODELS, SPARSE, assert_same, padding, sparse_mask, token_ids, triplet
from torch import nn
from transformers import BertConfig

from flash_models import hf, layouts, patch


@pytest.fixture(autouse=True)
def no_warning_given_yet(monkeypatch):
    monkeypatch.setattr(hf, "_warned", set())


class Stub(nn.Module):
    """An attention module as a model of another family may have it."""

    def __init__(self, is_causal, **config):
        super().__init__()
        self.is_causal = is_causal
        self.config = BertConfig(**config)


def expected_attention(query, key, value, visible, bias=0.0):
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1).double() for t in (key, value))
    scores = (query.double() @ key.mT / query.shape[-1] ** 0.5 + bias).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ value).transpose(1, 2)


FALLBACKS = {
    "a 4-D attention mask": {"attention_mask": "4-D"},
    "the head dim 12 of queries": {"head_dim": 12},
    "the dtype torch.float64": {"dtype": torch.float64},
    "grouped heads, 4 of queries and 2 of keys": {"key_heads": 2},
    "an additive position bias": {"position_bias": "given"},
    "a last dimension of q, k or v that is not contiguous": {"strided": True},
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("reason", FALLBACKS)
def test_fallback_is_right_and_says_why_once(device, reason, is_causal, monkeypatch, recwarn):
    case = FALLBACKS[reason]
    head_dim, dtype = case.get("head_dim", 16), case.get("dtype", torch.float32)
    query = torch.randn(2, 4, 7, head_dim, dtype=dtype, device=device)
    key, value = (torch.randn(2, case.get("key_heads", 4), 11, head_dim, dtype=dtype, device=device) for _ in range(2))
    if "strided" in case:
        value = value.mT.contiguous().mT
    mask = torch.tensor([[0, 11], [2, 9]], dtype=torch.int32, device=device)
    place = torch.arange(11, device=device)
    visible = (mask[:, :1, None, None] <= place) & (place < mask[:, 1:, None, None])
    if is_causal:
        visible = visible & torch.ones(7, 11, dtype=torch.bool, device=device).tril(4)
    if "attention_mask" in case:
        mask = visible.expand(2, 1, 7, 11)
    bias = torch.randn(1, 4, 7, 11, dtype=dtype, device=device) if "position_bias" in case else None
    arguments = (Stub(is_causal), query, key, value, mask)
    if dtype == torch.float32 and device.type == "cuda" and "attention_mask" not in case and bias is None:
        reason = "the dtype torch.float32 on cuda"
    for _ in range(2):
        out, weights = hf.attention_forward(*arguments, position_bias=bias)
    assert weights is None and out.shape == (2, 7, 4, head_dim)
    expected = expected_attention(query, key, value, visible, 0.0 if bias is None else bias.double())
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == 1 and reason in messages[0]
    monkeypatch.setenv("FLASH_MODELS_STRICT", "1")
    with pytest.raises(RuntimeError, match=reason):
        hf.attention_forward(*arguments, position_bias=bias)


@pytest.mark.filterwarnings("ignore:flash_models uses PyTorch")
@pytest.mark.parametrize("q_length, k_length", [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_fallback_without_padding(device, q_length, k_length, is_causal):
    query, key, value = (torch.randn(2, 2, length, 12, device=device) for length in (q_length, k_length, k_length))
    out, _ = hf.attention_forward(Stub(is_causal), query, key, value, None)
    visible = torch.ones(q_length, k_length, dtype=torch.bool, device=device)
    expected = expected_attention(query, key, value, visible.tril(k_length - q_length) if is_causal else visible)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_sparse", [None, {"pattern": "local", "window": 64, "block_size": 64}])
def test_fallback_of_packed_sequences(device, block_sparse):
    lengths = (130, 1, 70)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    query, key, value = (torch.randn(1, 2, 201, 12, device=device) for _ in range(3))
    module = Stub(True, block_sparse=block_sparse)
    with pytest.warns(UserWarning, match="because of the (head dim 12|dtype torch.float32 on cuda)"):
        out, _ = hf.attention_forward(module, query, key, value, None, cu_seq_lens_q=offsets, max_length_k=130)
    for begin, end in itertools.pairwise(offsets.tolist()):
        visible = torch.ones(end - begin, end - begin, dtype=torch.bool, device=device).tril()
        if block_sparse:
            visible &= layouts.local(end - begin, 64, block_size=64, device=device).token_mask()[0]
        expected = expected_attention(*(t[:, :, begin:end] for t in (query, key, value)), visible)
        torch.testing.assert_close(out[:, begin:end].double(), expected, atol=1e-5, rtol=1e-5)


def test_two_dimensional_mask_given_to_the_attention_function(device, strict):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    query, key, value = (torch.randn(3, 2, LENGTH, 16, device=device).to(dtype) for _ in range(3))
    mask = padding("both", device).bool()
    out, _ = hf.attention_forward(Stub(False), query, key, value, mask)
    expected = expected_attention(query, key, value, mask[:, None, None])
    torch.testing.assert_close(out.double(), expected, atol=1e-5 if device.type == "cpu" else 2e-2, rtol=1e-2)
    with pytest.raises(ValueError, match=r"4-D, bool \(B, Sk\) or an int32"):
        hf.attention_forward(Stub(False), query, key, value, mask.float())


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}])
def test_what_would_change_the_result_is_an_error(option):
    query = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match=f"no {next(iter(option))}; .* attn_implementation='eager'"):
        hf.attention_forward(Stub(False), query, query, query, None, **option)


def test_key_range(device):
    mask = torch.tensor(
        [[1, 1, 1], [0, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool, device=device
    )
    ranges, holes = hf.key_range(mask)
    assert ranges.dtype == torch.int32 and ranges.tolist() == [[0, 3], [1, 3], [0, 2], [1, 2], [0, 0], [0, 3]]
    assert holes.tolist() == [False] * 5 + [True]


def test_static_cache(device):
    patched, plain, _ = triplet(MODELS["gpt2"](), device)
    ids = token_ids(device, length=7)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    with pytest.warns(UserWarning, match="a static cache"):
        tokens = patched.generate(ids, **options)
    if device.type == "cpu":
        assert torch.equal(tokens, plain.generate(ids, **options))


@pytest.mark.parametrize("padded", ["none", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_weights_on_request(device, name, padded):
    patched, plain, truth = triplet(MODELS[name](), device)
    ids, mask = token_ids(device), padding(padded, device)
    with pytest.warns(UserWarning, match="because of output_attentions"):
        found = patched(ids, attention_mask=mask, output_attentions=True)
    others = [model(ids, attention_mask=mask, output_attentions=True) for model in (plain, truth)]
    valid = torch.ones_like(ids) if mask is None else mask
    assert_same(*(output.logits * valid[..., None] for output in (found, *others)))
    assert len(found.attentions) == 2
    for layer in zip(*(output.attentions for output in (found, *others)), strict=True):
        assert_same(*(weights * valid[:, None, :, None] for weights in layer))


def test_block_sparse_gpt2_with_and_without_cache(device):
    length = 200
    patched, plain, truth = triplet(MODELS["gpt2"](), device)
    patch(patched, block_sparse=SPARSE)
    ids = token_ids(device, length=length)
    mask = sparse_mask(length, device).tril()[None, None]
    others = [m(ids, attention_mask=mask.logical_not() * torch.finfo(m.dtype).min).logits for m in (plain, truth)]
    assert_same(patched(ids).logits, *others)
    head = patched(ids[:, :150], use_cache=True)
    with pytest.warns(UserWarning, match="block_sparse with a key-value cache"):
        tail = patched(ids[:, 150:], past_key_values=head.past_key_values).logits
    assert_same(tail, *(logits[:, 150:] for logits in others))
