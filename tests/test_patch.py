# SPDX-License-Identifier: Apache-2.0
"""patch and unpatch: what they find, what they leave behind, and what they refuse."""

import copy
import pickle

import pytest
import torch
from tiny_models import MODELS, SPARSE, token_ids
from torch import nn
from transformers import RobertaConfig, RobertaModel

from flash_models import FlashGPT2Config, FlashGPT2Model, patch, unpatch


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_exactly(name):
    model = MODELS[name]()
    before, hooks = model.config.to_dict(), [len(module._forward_pre_hooks) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    ids = token_ids("cpu")
    logits = model.eval()(ids).logits
    assert patch(model, block_sparse=SPARSE) is model
    assert patch(model) is model  # again, and the pattern stays
    assert model.config._attn_implementation == "io_aware" and model.config.block_sparse == SPARSE
    assert unpatch(model) is model
    assert model.config._attn_implementation == "eager" and model.config.to_dict() == before
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model(ids).logits, logits)
    assert unpatch(model) is model  # nothing left to do


@pytest.mark.parametrize("name", MODELS)
def test_patched_models_are_copied_pickled_and_saved(name, tmp_path, strict):
    model = patch(MODELS[name](), block_sparse=SPARSE).eval()
    ids = token_ids("cpu", length=150)
    logits = model(ids).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, logits)
    unpatch(copied)
    assert copied.config._attn_implementation == "eager" and model.config._attn_implementation == "io_aware"
    model.save_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, logits)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.block_sparse == SPARSE  # a pattern travels with the checkpoint
    assert torch.equal(patch(loaded).eval()(ids).logits, logits)


def test_patch_finds_models_inside_others(strict):
    class Retriever(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = nn.ModuleList([MODELS["bert"](), MODELS["gpt2"]()])

    retriever = patch(Retriever())
    assert all(tower.config._attn_implementation == "io_aware" for tower in retriever.towers)
    unpatch(retriever)
    assert all(tower.config._attn_implementation == "eager" for tower in retriever.towers)


def test_patch_errors_say_what_to_do():
    roberta = RobertaModel(RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    with pytest.raises(ValueError, match=r"RobertaModel holds no .*set_attn_implementation\('io_aware'\)"):
        patch(roberta)
    with pytest.raises(TypeError, match="got str"):
        patch("bert-base-uncased")
    model = MODELS["bert"]()
    with pytest.raises(ValueError, match="unknown block_sparse pattern 'spiral'"):
        patch(model, block_sparse={"pattern": "spiral"})
    assert model.config._attn_implementation == "eager"
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions is True"):
        patch(model)


def test_unpatch_leaves_a_flash_gpt2_its_own_hook():
    model = FlashGPT2Model(FlashGPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
    hooks = list(model._forward_pre_hooks.values())
    assert hooks
    unpatch(patch(model))
    assert list(model._forward_pre_hooks.values()) == hooks
