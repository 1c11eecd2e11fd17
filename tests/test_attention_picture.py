# SPDX-License-Identifier: Apache-2.0
"""eval/attention_picture.py: its rollout is that of the whole attention matrices, and a picture comes out."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import attention_picture  # noqa: E402
from PIL import Image  # noqa: E402
from tasks.pathx_model import create_model  # noqa: E402
from test_pathx import TINY, config  # noqa: E402, F401

from flash_models import hf, images_to_input_ids  # noqa: E402


@pytest.fixture
def model(config):  # noqa: F811
    torch.manual_seed(0)
    return create_model(32, config).eval()


@pytest.mark.parametrize("sparse", [True, False])
def test_rollout_multiplies_the_attention_of_the_layers(model, sparse, monkeypatch):
    if not sparse:
        model.config.block_sparse = None
    ids = images_to_input_ids(torch.randint(256, (1, 32, 32), dtype=torch.uint8), model.config)
    read = attention_picture.rollout(model, ids, 100)
    matrices, ours = [], hf.attention

    def whole(q, k, v, *, layout=None, **options):
        scores = torch.einsum("bhqd,bhkd->hqk", q, k) / q.shape[-1] ** 0.5
        if layout is not None:
            scores = scores.masked_fill(~layout.token_mask(), -torch.inf)
        matrices.append(scores.softmax(-1).mean(0))
        return ours(q, k, v, layout=layout, **options)

    monkeypatch.setattr(hf, "attention", whole)
    with torch.no_grad():
        model(input_ids=ids)
    product = torch.eye(ids.shape[1])
    for layer, matrix in enumerate(matrices):
        product = (matrix + torch.eye(len(matrix))) / 2 @ product
        torch.testing.assert_close(read[layer], product[100], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(read.sum(1), torch.ones(len(read)))


def test_pixels_are_where_the_image_has_them(model):
    image = torch.zeros(32, 32, dtype=torch.uint8)
    pixels = attention_picture.read_pixels(model, image, (9, 20))
    assert pixels.shape == (TINY["num_hidden_layers"], 32, 32)
    assert (pixels.flatten(1).argmax(1) == 9 * 32 + 20).all()  # half of it stays where it is, layer by layer
    assert (pixels[0, :, :8] == 0).all() and (pixels[0, :24, 8:] > 0).all()  # the 3 x 3 tiles around tile (1, 2)


def test_a_picture_comes_out(model, tmp_path):
    model.save_pretrained(tmp_path)
    attention_picture.main(["--model_name_or_path", str(tmp_path), "--image_size", "32", "--layers", "1", "2"])
    with Image.open(tmp_path / "attention.png") as image:
        assert image.width > image.height > 300
