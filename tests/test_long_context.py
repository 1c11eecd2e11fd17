# SPDX-License-Identifier: Apache-2.0
"""extend_context: what the longer table holds, what follows it, what it refuses."""

import copy

import pytest
import torch
from tiny_models import IMAGE, MODELS, ROTARY, SIZES, bert_config, gpt2_config, token_ids
from torch import nn
from transformers import BertModel, GPT2Model, PreTrainedTokenizerFast

from flash_models import FlashBertConfig, FlashBertModel, extend_context, layouts, patch
from flash_models.long_context import METHODS

NEW = 600


def flash_bert(**options):
    return FlashBertModel(FlashBertConfig(**{**SIZES, "max_position_embeddings": 256, **options}))


ALL = {**MODELS, "flash_bert": flash_bert}


def table_of(model):
    base = model.base_model
    return base.wpe if hasattr(base, "wpe") else base.embeddings.position_embeddings


@pytest.mark.parametrize("name", ALL)
def test_tables_grow(name, device):
    for method in ("tile", "interpolate"):
        model = ALL[name]().to(device, torch.bfloat16)
        old = table_of(model).weight.detach().clone()
        table_of(model).weight.requires_grad_(method == "tile")
        assert extend_context(model, NEW, method=method) is model
        table = table_of(model)
        new = table.weight
        assert new.shape == (NEW, 32) and table.num_embeddings == NEW
        assert (new.dtype, new.device, new.requires_grad) == (old.dtype, old.device, method == "tile")
        assert model.config.max_position_embeddings == NEW
        if method == "tile":
            assert torch.equal(new[:256], old) and torch.equal(new[256:512], old) and torch.equal(new[512:], old[:88])
        else:
            assert torch.equal(new[0], old[0]) and torch.equal(new[-1], old[-1])


def test_interpolation_is_linear():
    model = MODELS["bert"](max_position_embeddings=11)
    with torch.no_grad():
        table_of(model).weight.copy_(torch.arange(11.0)[:, None].expand(-1, 32))
    extend_context(model, 101)
    expected = (torch.arange(101.0) / 10)[:, None].expand(-1, 32)
    torch.testing.assert_close(table_of(model).weight.detach(), expected)


def test_a_table_of_one_row_is_repeated():
    model = extend_context(MODELS["bert"](max_position_embeddings=1), 4)
    assert (table_of(model).weight == table_of(model).weight[0]).all()


@pytest.mark.parametrize("name", ["bert", "flash_bert"])
def test_interpolation_over_an_image(name):
    """The table holds y + 100 x of each pixel; so does the longer one, in finer steps and in its own storing order."""

    def stored(side, values):
        if name == "bert":
            return values
        return torch.cat([torch.tensor([-7.0] * 64), values[layouts.tile_order(side, side, 64)]])

    def ramp(side, step):
        return ((torch.arange(side) * step)[:, None] + 100 * (torch.arange(side) * step)).flatten()

    num_global = {"bert": 0, "flash_bert": 64}[name]
    options = {} if name == "bert" else {"num_global_tokens": 64}
    model = ALL[name](max_position_embeddings=num_global + 16 * 16, **options)
    with torch.no_grad():
        table_of(model).weight.copy_(stored(16, ramp(16, 1.0))[:, None].expand(-1, 32))
    extend_context(model, num_global + 24 * 24, method="interpolate_2d")
    torch.testing.assert_close(table_of(model).weight[:, 3].detach(), stored(24, ramp(24, 15 / 23)))


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_saved_models_load_with_the_new_size(name, patched, tmp_path):
    model = ALL[name]()
    if patched:
        patch(model)
    extend_context(model, NEW, method="tile").eval()
    ids = token_ids(batch=1, length=NEW)
    expected = model(ids)[0]
    model.save_pretrained(tmp_path)
    options = {"attn_implementation": model.config._attn_implementation}
    loaded = type(model).from_pretrained(tmp_path, **options).eval()
    assert loaded.config.max_position_embeddings == NEW
    if patched:
        patch(loaded)
    assert torch.equal(loaded(ids)[0], expected)


@pytest.mark.parametrize("name", ALL)
def test_a_patched_model_runs_from_512_to_2048(name, device):
    model = ALL[name](max_position_embeddings=512) if name != "gpt2" else MODELS[name](n_positions=512)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = extend_context(patch(model.to(device, dtype)), 2048)
    out = model(token_ids(device, batch=1, length=2048))[0]
    out.float().square().mean().backward()
    assert torch.isfinite(out).all() and table_of(model).weight.grad[-1].abs().max() > 0


def test_outputs_within_the_old_length_are_kept_by_tile():
    for name in ALL:
        model = ALL[name]().eval()
        ids = token_ids()
        before = model(ids)[0]
        assert torch.equal(extend_context(model, NEW, method="tile")(ids)[0], before)


def test_models_inside_others():
    towers = nn.ModuleList([BertModel(bert_config()), GPT2Model(gpt2_config(n_positions=NEW, n_ctx=NEW))])
    towers.append(FlashBertModel(FlashBertConfig(**ROTARY)))
    rotary = copy.deepcopy(towers[2].config.to_dict())
    full = table_of(towers[1]).weight
    extend_context(towers, NEW)
    assert len(table_of(towers[0]).weight) == NEW and table_of(towers[1]).weight is full
    assert towers[2].config.to_dict() == rotary  # nothing to do there
    extend_context(towers, 700)
    assert towers[0].config.max_position_embeddings == towers[1].config.n_positions == towers[1].config.n_ctx == 700


def test_shared_tables_stay_shared():
    first, second = BertModel(bert_config()), BertModel(bert_config())
    table_of(second).weight = table_of(first).weight
    extend_context(nn.ModuleList([first, second]), NEW)
    assert table_of(first).weight is table_of(second).weight
    third, fourth = BertModel(bert_config()), BertModel(bert_config())
    fourth.embeddings.position_embeddings = third.embeddings.position_embeddings
    extend_context(nn.ModuleList([third, fourth]), NEW)
    assert fourth(token_ids(batch=1, length=NEW))[0].shape == (1, NEW, 32)


def test_the_tokenizer_follows(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")), model_max_length=256
    )
    extend_context(MODELS["bert"](), NEW, tokenizer=tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).model_max_length == NEW


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (MODELS["bert"], {"max_length": 128}, "already takes 256 tokens .* not shrink it to 128"),
        (MODELS["gpt2"], {"max_length": 256}, "already takes 256 tokens: nothing to extend"),
        (MODELS["bert"], {"max_length": 512.0}, "must be an int.* got 512.0"),
        (MODELS["bert"], {"max_length": 512, "method": "spline"}, f"one of .*{METHODS[0]}.* got 'spline'"),
        (lambda: FlashBertModel(FlashBertConfig(**ROTARY)), {"max_length": 9999}, "rotary .* any length"),
        (lambda: FlashBertModel(FlashBertConfig(**IMAGE)), {"max_length": 9999}, "rotary .* any length"),
        (lambda: nn.Linear(2, 2), {"max_length": 9}, "Linear holds no position table"),
        (MODELS["bert"], {"max_length": 500, "method": "interpolate_2d"}, "max_length 500 .* the next one is 529"),
        (
            lambda: MODELS["bert"](max_position_embeddings=250),
            {"max_length": 400, "method": "interpolate_2d"},
            "the table's 250 is not",
        ),
        (
            lambda: flash_bert(max_position_embeddings=16, num_global_tokens=64),
            {"max_length": 128, "method": "interpolate_2d"},
            "behind 64 global tokens",
        ),
    ],
)
def test_errors_leave_the_model_alone(make, arguments, message):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else None
    with pytest.raises(ValueError, match=message):
        extend_context(model, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert config is None or model.config.to_dict() == config


def test_a_name_is_not_a_model():
    with pytest.raises(TypeError, match="got str"):
        extend_context("bert-base-uncased", 2048)
