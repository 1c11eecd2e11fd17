# SPDX-License-Identifier: Apache-2.0
"""FlashBert: loads and saves like BERT, rotates q and k as it says, and reads images."""

import copy
import itertools
import pickle

import pytest
import torch
from tiny_models import IMAGE, ROTARY, SIZES, images, token_ids
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from flash_models import (
    FlashBertConfig,
    FlashBertForSequenceClassification,
    FlashBertModel,
    images_to_input_ids,
    layouts,
)

pytestmark = pytest.mark.usefixtures("strict")


PAIRS = [(BertModel, FlashBertModel), (BertForSequenceClassification, FlashBertForSequenceClassification)]


@pytest.mark.parametrize("vanilla_class, flash_class", PAIRS, ids=["model", "classifier"])
def test_weights_go_both_ways(vanilla_class, flash_class, tmp_path):
    vanilla = vanilla_class(BertConfig(**SIZES)).eval()
    vanilla.save_pretrained(tmp_path / "vanilla")
    flash = flash_class.from_pretrained(tmp_path / "vanilla")
    assert flash.config._attn_implementation == "io_aware"
    flash.save_pretrained(tmp_path / "flash")
    back = vanilla_class.from_pretrained(tmp_path / "flash", attn_implementation="eager")
    weights = vanilla.state_dict()
    for other in (flash, back):
        assert other.state_dict().keys() == weights.keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in other.state_dict().items())
    ids = token_ids()
    for one, other in zip(vanilla(ids).to_tuple(), flash(ids).to_tuple(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "auto_class, flash_class", [(AutoModel, PAIRS[0][1]), (AutoModelForSequenceClassification, PAIRS[1][1])]
)
@pytest.mark.parametrize("options", [SIZES, ROTARY, IMAGE], ids=["absolute", "rotary", "image"])
def test_save_and_load_with_auto_classes(auto_class, flash_class, options, tmp_path):
    model = flash_class(FlashBertConfig(**options)).eval()
    ids = images_to_input_ids(images(), model.config) if options is IMAGE else token_ids()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is FlashBertConfig and config.model_type == "flash_bert"
    assert all(getattr(config, name) == value for name, value in options.items())
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is flash_class and loaded.config._attn_implementation == "io_aware"
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(model(ids).to_tuple(), other(ids).to_tuple(), strict=True))
    half = auto_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in half.parameters())
    torch.testing.assert_close(half(ids)[0].float(), model(ids)[0], atol=0.3, rtol=0.1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attention_on_request(implementation, tmp_path):
    model = FlashBertModel(FlashBertConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    other = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert other.config._attn_implementation == implementation
    ids = token_ids()
    torch.testing.assert_close(model(ids)[0], other(ids)[0], atol=1e-5, rtol=1e-5)
    FlashBertModel(FlashBertConfig(**SIZES, attn_implementation=implementation))(ids)


@pytest.mark.parametrize("options, what", [(ROTARY, "rotary positions"), (IMAGE, "rotary"), (SIZES, "block_sparse")])
def test_attention_that_would_change_the_result_is_an_error(options, what):
    if options is SIZES:
        options = {**SIZES, "block_sparse": {"pattern": "local", "window": 64}}
    model = FlashBertModel(FlashBertConfig(**options))
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        ValueError, match=f"{what}.*attn_implementation='sdpa' would silently leave out; use 'io_aware'"
    ):
        model(token_ids())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"position_embedding_type": "alibi"}, r"must be one of \('absolute', 'rotary', 'rotary_2d'\), got 'alibi'"),
        ({"position_embedding_type": "rotary_2d", "num_attention_heads": 16}, "head dim divisible by 4, got 2"),
        ({"image_block_size": 32}, r"image_block_size must be one of \(64, 128\), got 32"),
        ({"block_sparse": {"pattern": "spiral"}}, "unknown block_sparse pattern 'spiral'"),
    ],
)
def test_configuration_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FlashBertConfig(**{**SIZES, **options})


def test_a_vanilla_configuration_is_an_error():
    with pytest.raises(TypeError, match=r"takes a FlashBertConfig, got BertConfig; convert it with FlashBertConfig\("):
        FlashBertModel(BertConfig(**SIZES))
    converted = FlashBertConfig(**BertConfig(**SIZES).to_dict())
    assert type(FlashBertModel(converted)) is FlashBertModel


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"<html>" * 99])
@pytest.mark.parametrize("load", [FlashBertModel.from_pretrained, AutoModel.from_pretrained])
def test_damaged_checkpoint(load, damage, tmp_path):
    FlashBertModel(FlashBertConfig(**SIZES)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(OSError, match=f"the weights in {tmp_path} are damaged or cut short .* fetch them again"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "flash_b')
    with pytest.raises(OSError, match="config.json"):
        load(tmp_path)


# images


def test_images_to_input_ids(device):
    image = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16)
    ids = images_to_input_ids(image, FlashBertConfig(**IMAGE))
    assert ids.shape == (1, 64 + 256) and ids.dtype == torch.int64
    assert ids[0, :64].tolist() == list(range(256, 320))
    assert ids[0, 64:74].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 16, 17]  # a tile of 8 x 8, row by row
    assert ids[0, 128:130].tolist() == [8, 9] and ids[0, 192] == 128
    wide = images_to_input_ids(image, FlashBertConfig(**{**IMAGE, "image_block_size": 128}))
    assert wide[0, 64:82].tolist() == list(range(18))


@pytest.mark.parametrize(
    "image, options, message",
    [
        (torch.zeros(1, 16, 16), {}, r"uint8 \(B, side, side\), got torch.float32"),
        (torch.zeros(16, 16, dtype=torch.uint8), {}, r"of shape \(16, 16\)"),
        (torch.zeros(1, 16, 24, dtype=torch.uint8), {}, r"of shape \(1, 16, 24\)"),
        (torch.zeros(1, 12, 12, dtype=torch.uint8), {}, "8 x 8 pixels .* do not divide 12 x 12"),
        (torch.zeros(1, 16, 16, dtype=torch.uint8), {"vocab_size": 256}, "vocab_size is 256, .* need 320"),
    ],
)
def test_image_errors(image, options, message):
    with pytest.raises(ValueError, match=message):
        images_to_input_ids(image, FlashBertConfig(**{**IMAGE, **options}))


def test_neighbouring_pixels_are_near_in_attention(device):
    """Tile order, rotation and layout agree on where a pixel is: what a pixel sees lies around it."""
    config = FlashBertConfig(**IMAGE)
    visible = layouts.from_config({**config.block_sparse, "global": 64}, 64 + 1024, 64 + 1024, device).token_mask()[0]
    order = layouts.tile_order(32, 32, 64, device)
    y, x = order // 32, order % 32
    for pixel, other in itertools.product((0, 500, 1023), range(0, 1024, 37)):
        near = abs(y[pixel] // 8 - y[other] // 8) <= 1 and abs(x[pixel] // 8 - x[other] // 8) <= 1
        assert visible[64 + pixel, 64 + other].item() == bool(near)
