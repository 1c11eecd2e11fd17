# SPDX-License-Identifier: Apache-2.0
"""The parts of eval/lra.py: ListOps' grammar and cache, the compared attentions."""

import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from tasks import lra_baselines, lra_listops
from tasks.document_model import ClassifierLoss
from tasks.lra_data import SequenceBatches, encode, from_rows, read_files
from tasks.lra_model import ATTENTIONS, create_model, new_config
from tasks.lra_tasks import CLS
from tasks.text_files import Rows

from flash_models import reference

NAMES = {number: word for word, number in lra_listops.WORDS.items()}
FUNCTIONS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def value_and_depth(tokens):
    """Value and depth of an expression by a stack, and the numbers of arguments of its operators."""
    stack, depth, arguments = [[]], 0, []
    for word in (NAMES[token] for token in tokens):
        if word in FUNCTIONS:
            stack.append([word])
        elif word == "]":
            name, *values = stack.pop()
            arguments.append(len(values))
            stack[-1].append(FUNCTIONS[name](values))
        else:
            stack[-1].append(int(word))
        depth = max(depth, len(stack))
    ((value,),) = stack
    return value, depth, arguments


def test_every_expression_has_the_value_that_another_evaluator_finds():
    operators, arguments, values = set(), set(), []
    for number in range(150):
        tokens, value = lra_listops.expression("train", number)
        found, depth, counts = value_and_depth(tokens.tolist())
        assert found == value and depth <= 10 and 500 < len(tokens) < 2000
        operators |= set(tokens.tolist())
        arguments |= set(counts)
        values.append(value)
    assert operators == set(range(15)) and arguments == set(range(2, 11)) and set(values) == set(range(10))


def test_operators():
    for values in ([3, 4], [9, 0, 0], [7], [5, 5, 1, 8]):
        for number, name in enumerate(lra_listops.OPERATORS):
            assert lra_listops.apply(number, values) == FUNCTIONS[f"[{name}"](values)


def test_shares_of_the_grammar():
    """Of the nodes above the deepest level a quarter are operators, of all kinds alike, before short and long
    expressions are thrown away, which makes operators more frequent."""
    draw, nodes, kinds = np.random.default_rng(0).random, 0, []
    for _ in range(3000):
        tokens = []
        lra_listops._grow(draw, tokens, 8)
        depth = 8
        for token in tokens:
            nodes += depth < 10 and token != lra_listops.CLOSE
            kinds += [token - 10] * (10 <= token < lra_listops.CLOSE)
            depth += (10 <= token < lra_listops.CLOSE) - (token == lra_listops.CLOSE)
    assert len(kinds) / nodes == pytest.approx(0.25, abs=0.015)
    np.testing.assert_allclose(np.bincount(kinds) / len(kinds), 0.25, atol=0.04)


def test_splits_are_disjoint_and_the_same_whoever_makes_them(tmp_path):
    sets = {}
    for split in lra_listops.SPLITS:
        sequences, labels = lra_listops.load(split, 30, num_workers=1)
        spread, again = lra_listops.load(split, 30, cache_dir=tmp_path, num_workers=2)
        assert labels == again and all(map(np.array_equal, sequences, spread))
        sets[split] = {sequence.tobytes() for sequence in sequences}
        assert len(sets[split]) == 30
    assert not sets["train"] & sets["test"] and not sets["train"] & sets["validation"]
    assert not sets["validation"] & sets["test"]
    other, _ = lra_listops.load("test", 30, num_workers=1, base_seed=1)
    assert not sets["test"] & {sequence.tobytes() for sequence in other}


def test_the_cache_is_used_continued_and_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(lra_listops, "SHARD", 8)
    monkeypatch.setattr(lra_listops, "CHUNK", 3)
    load = lambda count: lra_listops.load("test", count, tmp_path, num_workers=1)  # noqa: E731
    expected, labels = load(20)
    assert len(list(tmp_path.iterdir())) == 3
    made = []
    monkeypatch.setattr(lra_listops, "_chunk", lambda *span, make=lra_listops._chunk: made.append(span) or make(*span))

    def same(count):
        found, values = load(count)
        assert values == labels[:count] and all(map(np.array_equal, found, expected)) and len(found) == count

    same(20)
    same(13)
    assert not made  # all of it, and a part of it, are there
    second = sorted(tmp_path.iterdir())[1]
    second.write_bytes(second.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged and made anew"):
        same(20)
    assert [span[1:3] for span in made] == [(8, 11), (11, 14), (14, 16)]
    assert load(24)[1][:20] == labels  # the last file was made for fewer


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot write the cache"):
        assert len(lra_listops.load("test", 2, tmp_path / "file" / "cache", num_workers=1)[0]) == 2


def test_the_released_files_are_read(tmp_path):
    text = "( ( ( [MAX 3 ) ( ( ( [SM 8 ) 7 ) ] ) ) ] )"
    assert lra_listops.parse(text).tolist() == [11, 3, 13, 8, 7, 14, 14]
    (tmp_path / "basic_test.tsv").write_text(f"Source\tTarget\n{text}\t5\n[MIN 1 2\t1\n")
    examples = read_files("listops", [tmp_path / "basic_test.tsv"])
    assert examples.labels == ["5"] and "basic_test.tsv:3: 1 lists are not closed" in examples.problems[0]
    with pytest.raises(ValueError, match="nothing opened"):
        lra_listops.parse("[MAX 1 2 ] ]")
    with pytest.raises(ValueError, match="empty"):
        lra_listops.parse("( )")


def small_model(name, task="listops", **sizes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, **sizes}
    return create_model(new_config(task, name, ["a", "b", "c"], 128, 0.0, **sizes))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_has_shapes_gradients_and_is_blind_to_padding(name):
    model = small_model(name)
    ids = torch.randint(256, (3, 128))
    mask = torch.ones(3, 128, dtype=torch.long)
    mask[1, 70:] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.shape == (3, 3)
    logits.square().sum().backward()
    for key, weight in model.named_parameters():
        if weight.requires_grad and "position_embeddings" not in key and "word_embeddings" not in key:
            assert weight.grad.abs().max() > 0 or "key.bias" in key, key
    other = ids.clone()
    other[1, 70:] = 7
    torch.testing.assert_close(model.eval()(other, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    if name == "linformer":
        return  # on a part of its length it is another projection of the same
    torch.testing.assert_close(
        model(ids[1:2, :70]).logits, model(ids, attention_mask=mask).logits[1:2], rtol=1e-3, atol=1e-4
    )


def test_exact_attentions_agree():
    expected = small_model("standard").eval()
    ids = torch.randint(256, (2, 128))
    for name in ("sdpa", "flash"):
        model = small_model(name).eval()
        model.load_state_dict(expected.state_dict())
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


def test_performer_approaches_softmax_with_more_features():
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    q, k = 0.5 * q, 0.5 * k  # the variance of the features grows with the exponential of the square
    exact, _ = reference.attention_reference(*(t.transpose(1, 2) for t in (q, k, v)), scale=0.25)
    errors = []
    for count in (16, 4096):
        module = torch.nn.Module()
        module.performer_directions = lra_baselines.orthogonal_directions(count, 16)
        out, _ = lra_baselines.performer(module, q, k, v, None, scaling=0.25)
        assert out.shape == (1, 40, 2, 16)
        errors.append((out - exact).norm() / exact.norm())
    assert errors[1] < 0.1 and errors[1] < errors[0] / 3


def test_linformer_with_the_identity_is_exact():
    module = torch.nn.Module()
    module.linformer_projection = torch.eye(40).expand(2, 40, 40)
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    out, _ = lra_baselines.linformer(module, q, k, v, None, scaling=0.25)
    exact, _ = reference.attention_reference(*(t.transpose(1, 2) for t in (q, k, v)), scale=0.25)
    torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unpad", [False, True])
def test_pairs_stay_together_padded_and_packed(unpad):
    draw = np.random.default_rng(0)
    pairs = [tuple(draw.integers(0, 9, n).astype(np.int16) for n in draw.integers(1, 9, 2)) for _ in range(6)]
    batches = SequenceBatches(pairs, np.arange(6), 6, 20, unpad, 0)
    seen = []
    for batch in batches(0, 0, 1):
        ids = batch["input_ids"]
        if "cu_seq_lens_q" in batch:
            rows = [row.tolist() for row in ids[0].split(batch["cu_seq_lens_q"].diff().tolist())]
        else:
            mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
            rows = [row[visible].tolist() for row, visible in zip(ids, mask, strict=True)]
        assert unpad or ids.numel() <= 20 or len(batch["targets"]) == 1
        for number, target in enumerate(batch["targets"].tolist()):
            assert rows[2 * number : 2 * number + 2] == [part.tolist() for part in pairs[target]]
            seen.append(target)
    assert sorted(seen) == list(range(6))


def test_the_pair_head_sees_both_and_packing_changes_nothing():
    module = ClassifierLoss(small_model("flash", "retrieval").eval())
    pairs = [(np.full(n, n, np.int16), np.full(n + 3, 5, np.int16)) for n in (4, 9, 20)]
    logits = [
        module.logits(**SequenceBatches(pairs, np.arange(3), 3, 999, unpad, 0).collate([0, 1, 2]))
        for unpad in (False, True)
    ]
    torch.testing.assert_close(*logits)
    swapped = [(b, a) for a, b in pairs]
    other = module.logits(**SequenceBatches(swapped, np.arange(3), 3, 999, True, 0).collate([0, 1, 2]))
    assert (other - logits[1]).abs().min() > 0


def test_encoding_cuts_to_what_the_model_reads(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "h\\u00e9llo", "label": 1}\n{"text": "", "label": 0}\n')
    examples = read_files("text", [tmp_path / "a.jsonl"])
    first, second = encode(examples, new_config("text", "flash", ["0", "1"], 5))
    assert first.tolist() == [CLS, *"h\u00e9l".encode()] and second.tolist() == [CLS]
    image = np.arange(1024).reshape(32, 32).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=image[None], labels=np.array([3]))
    examples = read_files("image", [tmp_path / "a.npz"])
    assert encode(examples, new_config("image", "flash", ["0", "1"]))[0].tolist() == [CLS, *image.ravel()]
    with pytest.raises(ValueError, match="an image is 1025 tokens, the model reads 1024"):
        encode(examples, new_config("image", "flash", ["0", "1"], 1024))


def test_rows_of_the_hub():
    """What `datasets` gives of CIFAR-10 and of IMDB."""
    colours = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    picture = Image.fromarray(colours)
    rows = Rows(
        [("row 1", {"img": picture, "label": "cat"}), ("row 2", {"img": picture.resize((8, 8)), "label": "dog"})]
    )
    examples = from_rows("image", rows, "cifar10, test")
    assert examples.labels == ["cat"] and "8 x 8 pixels; expected 32 x 32" in examples.problems[0]
    assert np.abs(examples.items[0].astype(int) - np.asarray(picture.convert("L")).astype(int)).max() <= 1
    examples = from_rows("text", Rows([("row 1", {"text": "fine", "label": "pos"})]), "imdb, test")
    assert examples.labels == ["pos"] and examples.items[0].tobytes() == b"fine"
