# SPDX-License-Identifier: Apache-2.0
"""Tiny BERT and GPT-2 models and inputs, and how near a patched one must come: what the tests of hf.py share."""

import copy
import itertools

import torch
from numerics import assert_as_accurate_as
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from flash_models import layouts, patch

VOCABULARY = 97
LENGTH = 21
SHARP = 0.2  # spread of the weights: attention is far from uniform, so that a wrong mask shows
SPARSE = {"pattern": "local_global", "window": 64, "global": 64, "block_size": 64}


def bert_config(**options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    defaults = {"max_position_embeddings": 256, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    defaults |= {"vocab_size": VOCABULARY, "initializer_range": SHARP, "attn_implementation": "eager"}
    return BertConfig(**(sizes | defaults | options))


def gpt2_config(**options):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "bos_token_id": 1, "eos_token_id": None}
    defaults = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "pad_token_id": 0}
    defaults |= {"vocab_size": VOCABULARY, "initializer_range": SHARP, "attn_implementation": "eager"}
    return GPT2Config(**(sizes | defaults | options))


MODELS = {
    "bert": lambda **options: BertForMaskedLM(bert_config(**options)),
    "gpt2": lambda **options: GPT2LMHeadModel(gpt2_config(**options)),
}


def triplet(model, device):
    """(patched, plain, truth): the model on the kernels; without, in the same dtype; and without, in float32.

    The dtype is bfloat16 on CUDA; on CPU all three are float32.
    """
    truth = model.to(device).eval()
    plain = copy.deepcopy(truth).to(torch.float32 if device.type == "cpu" else torch.bfloat16)
    return patch(copy.deepcopy(plain)), plain, truth


def assert_same(actual, plain, truth, name="result", noise=1e-3):
    """CPU, float32: 1e-5 of the largest entry, or of 1. CUDA, bfloat16: twice the error of plain PyTorch."""
    dtype = working_dtype(actual.device)
    if dtype == torch.float32:
        error, size = (actual - truth).abs().max().item(), truth.abs().max().item()
        assert actual.shape == truth.shape and error <= 1e-5 * max(size, 1), (
            f"{name}: error {error:.2e}, size {size:.2e}"
        )
    else:
        # A loss is float32, but computed from what is bfloat16.
        assert_as_accurate_as(actual.to(dtype), plain, truth, name=name, noise=noise)


def assert_all_same(actual, plain, truth):
    """`assert_same` for dicts of results and of gradients, by parameter name."""
    assert actual.keys() == truth.keys()
    for name, value in truth.items():
        if value is None:
            assert actual[name] is None
            continue
        noise = 1e-3
        if name.endswith("key.bias"):
            # Its exact gradient is 0, for a softmax does not see what it adds. What is left is noise of the size that
            # the gradient of the queries' bias has, in one tensor with it in GPT-2.
            others = truth[name.removesuffix("key.bias") + "query.bias"]
            noise += 2 * torch.finfo(torch.bfloat16).eps * others.abs().max().item()
        assert_same(actual[name], plain[name], value, name, noise)


def token_ids(device="cpu", batch=3, length=LENGTH):
    return torch.randint(2, VOCABULARY, (batch, length), device=device)


def padding(kind, device, batch=3, length=LENGTH):
    mask = torch.ones(batch, length, dtype=torch.long, device=device)
    if kind in ("right", "both"):
        mask[0, length - 6 :] = 0
    if kind in ("left", "both"):
        mask[1, :4] = 0
    if kind == "holes":
        mask[2, 5:9] = 0
    return None if kind == "none" else mask


def packed_batch(device, lengths=(5, 1, 12, 3)):
    """What DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes, and the documents apart."""
    documents = [token_ids(device, 1, length) for length in lengths]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    batch = {"input_ids": torch.cat(documents, 1), "position_ids": positions}
    lengths = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return documents, batch | {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets} | lengths


def sparse_mask(length, device):
    return layouts.local_global(length, 64, 64, block_size=64, device=device).token_mask()[0]


# the configurations of FlashBert that the tests use
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": SHARP,
}
ROTARY = {**SIZES, "position_embedding_type": "rotary", "rotary_max_wavelength": 500.0}
IMAGE = {
    **SIZES,
    "vocab_size": 256 + 64,
    "position_embedding_type": "rotary_2d",
    "rotary_max_wavelength": 64.0,
    "num_global_tokens": 64,
    "block_sparse": {"pattern": "grid_2d", "radius": 1, "block_size": 64},
}


def working_dtype(device):
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def images(side=24, batch=2, device="cpu"):
    return torch.randint(0, 256, (batch, side, side), dtype=torch.uint8, device=device)
