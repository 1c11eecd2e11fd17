# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of FlashBert: the rotation by another route, and what follows from it for whole models."""

import math

import pytest
import torch
from numerics import assert_as_accurate_as
from tiny_models import IMAGE, ROTARY, images, token_ids, working_dtype
from transformers import (
    BertLMHeadModel,
)

from flash_models import (
    FlashBertConfig,
    FlashBertForSequenceClassification,
    FlashBertModel,
    _library,
    hf,
    images_to_input_ids,
    layouts,
)
from flash_models.models.modeling import FlashBertMixin
from flash_models.models.rotary import rotary_tables, rotate
from flash_models.reference import attention_reference

pytestmark = pytest.mark.usefixtures("strict")


def turned(x, angle):
    """x (S, H, D) as D / 2 complex numbers, times exp(i angle), (S, D / 2): rotary embedding by another route."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([z.real, z.imag], -1)


def frequencies(count, max_wavelength):
    return torch.tensor(
        [(2 * math.pi / max_wavelength) ** (i / (count - 1)) for i in range(count)], dtype=torch.float64
    )


def angles(config, length, head_dim):
    if config.position_embedding_type == "rotary":
        return torch.arange(length)[:, None] * frequencies(head_dim // 2, config.rotary_max_wavelength)
    side = math.isqrt(length - config.num_global_tokens)
    frequency = frequencies(head_dim // 4, config.rotary_max_wavelength)
    angle = torch.zeros(length, head_dim // 2, dtype=torch.float64)
    for place, pixel in enumerate(layouts.tile_order(side, side, config.image_block_size).tolist()):
        turn = torch.cat([pixel // side * frequency, pixel % side * frequency])
        angle[config.num_global_tokens + place] = turn
    return angle


class Attention(torch.nn.Module):
    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config


@pytest.mark.parametrize("options, length", [(ROTARY, 1500), (IMAGE, 64 + 24 * 24)], ids=["text", "image"])
def test_attention_turns_queries_and_keys(device, options, length):
    config = FlashBertConfig(**options)
    q, k, v = (torch.randn(1, length, 2, 16, dtype=torch.float64) for _ in range(3))
    angle = angles(config, length, 16)
    layout = layouts.grid_2d(24, 24, 1, 64) if options is IMAGE else None
    results = []
    for dtype in (working_dtype(device), torch.float64):
        truth, _ = attention_reference(
            *(turned(t[0].to(dtype).double(), angle).to(dtype)[None] for t in (q, k)),
            v.to(dtype),
            layout=layout,
            dtype=dtype,
        )
        results.append(truth)
    out, _ = hf.attention_forward(
        Attention(config), *(t.to(device, working_dtype(device)).transpose(1, 2) for t in (q, k, v)), None
    )
    assert_as_accurate_as(out, *results, noise=2e-5)


def test_tables_are_cached_and_exact_far_out(device):
    config = FlashBertConfig(**ROTARY)
    cos, sin = rotary_tables(config, 65_536, 16, device)
    assert cos.dtype == torch.float32 and cos.shape == (65_536, 8) and cos.device.type == device.type
    angle = 65_535 * frequencies(8, 500.0)
    torch.testing.assert_close(cos[-1].cpu(), angle.cos().float())
    torch.testing.assert_close(sin[-1].cpu(), angle.sin().float())
    assert rotary_tables(config, 65_536, 16, device)[0].data_ptr() == cos.data_ptr()
    image = FlashBertConfig(**IMAGE)
    assert rotary_tables(image, 64 + 64, 16, device)[0] is rotary_tables(image, 64 + 64, 16, device)[0]


def test_rotation_depends_on_distance_alone(device):
    config = FlashBertConfig(**ROTARY)
    cos, sin = rotary_tables(config, 400, 16, device)
    q, k = (torch.randn(16, device=device, dtype=torch.float64).expand(1, 400, 1, 16) for _ in range(2))
    scores = (rotate(q, cos, sin)[0, :, 0] @ rotate(k, cos, sin)[0, :, 0].T)[:300, :300]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], atol=1e-5, rtol=1e-5)
    assert rotate(q.bfloat16(), cos, sin).dtype == torch.bfloat16
    assert torch.equal(rotate(q, cos, sin)[:, 0], q[:, 0])


def test_global_tokens_do_not_turn(device):
    cos, sin = rotary_tables(FlashBertConfig(**IMAGE), 64 + 32 * 32, 16, device)
    assert (cos[:64] == 1).all() and (sin[:64] == 0).all() and (sin[65:] != 0).any(1).all()


def test_a_larger_image_continues_the_same_positions():
    """Positions are pixels: the tile at the top left has the same tables at every resolution."""
    config = FlashBertConfig(**IMAGE)
    small, large = (rotary_tables(config, 64 + side * side, 16, torch.device("cpu")) for side in (16, 64))
    assert torch.equal(small[0][:128], large[0][:128]) and torch.equal(small[1][:128], large[1][:128])


@pytest.mark.parametrize("length", [64 + 24 * 24 + 1, 64, 10])
def test_length_that_is_no_image(length):
    with pytest.raises(ValueError, match=f"64 global tokens .* a square image, got {length} tokens"):
        rotary_tables(FlashBertConfig(**IMAGE), length, 16, torch.device("cpu"))


def test_padding_does_not_change_a_rotary_model(device):
    model = FlashBertModel(FlashBertConfig(**ROTARY)).to(device, working_dtype(device)).eval()
    ids = token_ids(device)
    alone = model(ids)[0]
    noise = 1e-5 if device.type == "cpu" else 0.1
    for side in ("left", "right"):
        pad = (9, 0) if side == "left" else (0, 9)
        padded, mask = (torch.nn.functional.pad(t, pad) for t in (ids, torch.ones_like(ids)))
        out = model(padded, attention_mask=mask)[0][:, pad[0] :][:, :21]
        torch.testing.assert_close(out, alone, atol=noise, rtol=noise)


def test_packed_rotary_documents(device):
    model = FlashBertModel(FlashBertConfig(**ROTARY)).to(device, working_dtype(device)).eval()
    documents = [token_ids(device, 1, length) for length in (5, 1, 12)]
    offsets = torch.tensor([0, 5, 6, 18], dtype=torch.int32, device=device)
    packing = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 12, "max_length_k": 12}
    packed = model(torch.cat(documents, 1), **packing)[0]
    noise = 1e-5 if device.type == "cpu" else 0.1
    torch.testing.assert_close(packed, torch.cat([model(d)[0] for d in documents], 1), atol=noise, rtol=noise)


def test_rotary_decoder_with_and_without_cache(device):
    class FlashDecoder(FlashBertMixin, BertLMHeadModel):
        pass

    model = FlashDecoder(FlashBertConfig(**ROTARY, is_decoder=True)).to(device, working_dtype(device)).eval()
    ids, cache, chunks = token_ids(device), None, []
    for chunk in ids.split([9, 1, 11], 1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chunks.append(out.logits)
    noise = 1e-4 if device.type == "cpu" else 0.2
    torch.testing.assert_close(torch.cat(chunks, 1), model(ids).logits, atol=noise, rtol=noise)


@pytest.mark.parametrize("options", [ROTARY, IMAGE], ids=["text", "image"])
def test_rotary_models_have_no_table_and_use_every_weight(device, options):
    model = FlashBertForSequenceClassification(FlashBertConfig(**options)).to(device, working_dtype(device))
    assert not [name for name, _ in model.named_parameters() if "position" in name]
    ids = images_to_input_ids(images(device=device), model.config) if options is IMAGE else token_ids(device, 2)
    model(ids, labels=torch.tensor([0, 1], device=device)).loss.backward()
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in model.parameters())


def test_default_inputs_equal_spelled_out_ones():
    model = FlashBertModel(FlashBertConfig(**ROTARY)).eval()
    ids = token_ids()
    expected = model(ids)[0]
    torch.testing.assert_close(model(ids, token_type_ids=torch.zeros_like(ids))[0], expected)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids))[0], expected)
    assert not torch.allclose(model(ids, token_type_ids=torch.ones_like(ids))[0], expected, atol=0.1)


def test_longer_than_any_table(device):
    """65,600 tokens, whatever max_position_embeddings says."""
    if _library.no_kernel_reason(device) is not None:
        pytest.skip("the plain PyTorch reference keeps the score matrix, 16 GiB here")
    options = {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 16}
    config = FlashBertConfig(**{**IMAGE, **options}, max_position_embeddings=8)
    model = FlashBertModel(config).to(device, working_dtype(device)).eval()
    with torch.no_grad():
        out = model(images_to_input_ids(images(256, 1, device), config))[0]
    assert out.shape == (1, 64 + 65_536, 16) and torch.isfinite(out).all()


OTHER_TEXT = {
    **ROTARY,
    "rotary_max_wavelength": 77.5,
    "block_sparse": {"pattern": "local", "window": 64, "block_size": 64},
}
OTHER_IMAGE = {
    **IMAGE,
    "num_global_tokens": 128,
    "vocab_size": 384,
    "block_sparse": {"pattern": "grid_2d", "radius": 2},
}


@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize(
    "options, size",
    [(ROTARY, 24), (ROTARY, 40), (OTHER_TEXT, 130), (IMAGE, 24), (OTHER_IMAGE, 24), (OTHER_IMAGE, 32)],
    ids=["text", "longer-text", "other-text", "image", "other-image", "larger-image"],
)
def test_compiles_to_one_graph(device, options, size):
    """In this order: torch.compile makes a variable of a number that changes, which not every number may be."""
    if (options, size) == (ROTARY, 24):
        torch._dynamo.reset()
    model = FlashBertForSequenceClassification(FlashBertConfig(**{**options, "num_hidden_layers": 1}))
    model = model.to(device, working_dtype(device)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device.type == "cuda" else "eager")
    noise = 1e-5 if device.type == "cpu" else 0.05
    is_image = options["position_embedding_type"] == "rotary_2d"
    for _ in range(2):
        ids = token_ids(device, 2, size)
        if is_image:
            ids = images_to_input_ids(images(size, 2, device), model.config)
        grads = []
        for run in (compiled, model):
            model.zero_grad()
            out = run(ids, labels=torch.tensor([0, 1], device=device))
            out.loss.backward()
            grads.append([out.logits, *(weight.grad.clone() for weight in model.parameters())])
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, atol=noise, rtol=noise)
