# SPDX-License-Identifier: Apache-2.0
"""Every head of BERT and GPT-2: results and weights are those of the Hugging Face class, however it is loaded."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from head_models import HEADS, inputs, tensors, vanilla_model
from tiny_models import VOCABULARY, assert_all_same, bert_config, gpt2_config, token_ids, working_dtype

import flash_models
from flash_models.models import bert, gpt2

every_head = pytest.mark.parametrize("name", HEADS)


pytestmark = pytest.mark.usefixtures("strict")


def flash_class(name):
    return getattr(flash_models, f"Flash{name}")


def assert_same_weights(one, other):
    weights, others = one.state_dict(), other.state_dict()
    assert weights.keys() == others.keys() and weights
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def load_exactly(loader, folder, **options):
    model, report = loader.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@every_head
def test_results_and_gradients_are_those_of_transformers(name, device, tmp_path):
    truth = vanilla_model(name)
    truth.save_pretrained(tmp_path)
    flash = flash_class(name).from_pretrained(tmp_path, dtype=working_dtype(device)).to(device).eval()
    assert flash.config._attn_implementation == "io_aware"
    plain = copy.deepcopy(truth).to(device, working_dtype(device))
    batch, labelled = inputs(name, device)
    runs = []
    for model in (flash, plain, truth.to(device)):
        results = tensors(model(**batch))
        if batch.keys() != labelled.keys():
            results["loss"] = model(**labelled).loss
        last = results.get("loss", results[next(iter(results))])
        last.float().square().mean().backward()
        runs.append(results | {name: weight.grad for name, weight in model.named_parameters()})
    assert len(runs[0]) > 20
    assert_all_same(*runs)


@every_head
def test_weights_go_both_ways(name, tmp_path):
    vanilla = vanilla_model(name)
    vanilla.save_pretrained(tmp_path / "vanilla")
    flash = load_exactly(flash_class(name), tmp_path / "vanilla")
    assert_same_weights(vanilla, flash)
    flash.save_pretrained(tmp_path / "flash", max_shard_size="20KB")
    shards = list((tmp_path / "flash").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and not list((tmp_path / "flash").glob("*.bin"))
    saved = json.loads((tmp_path / "flash" / "config.json").read_text())
    family = "bert" if name.startswith("Bert") else "gpt2"
    assert saved["model_type"] == f"flash_{family}" and saved["architectures"] == [f"Flash{name}"]
    assert_same_weights(vanilla, load_exactly(getattr(transformers, name), tmp_path / "flash"))

    if HEADS[name][0] is not None:
        auto = getattr(transformers, HEADS[name][0])
        loaded = load_exactly(auto, tmp_path / "flash")
        assert type(loaded) is flash_class(name) and loaded.config._attn_implementation == "io_aware"
        assert_same_weights(vanilla, loaded)
        half = auto.from_pretrained(tmp_path / "flash", dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16
        assert type(auto.from_config(loaded.config)) is flash_class(name)
    base = transformers.AutoModel.from_pretrained(tmp_path / "flash")
    assert base.config.model_type == f"flash_{family}" and type(base) is flash_class(f"{name[:4]}Model")


@every_head
def test_copies_are_the_same_model(name):
    model = flash_class(name)(flash_class(name).config_class(**vanilla_model(name).config.to_dict())).eval()
    batch, _ = inputs(name)
    expected = tensors(model(**batch))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert all(torch.equal(value, expected[key]) for key, value in tensors(other(**batch)).items())


def test_same_seed_same_model():
    """A model that is trained from scratch starts where the Hugging Face class starts."""
    for name in ("BertForMaskedLM", "GPT2LMHeadModel"):
        torch.manual_seed(1)
        vanilla = vanilla_model(name)
        torch.manual_seed(1)
        flash = flash_class(name)(flash_class(name).config_class(**vanilla.config.to_dict()))
        assert_same_weights(vanilla, flash)


def test_tied_weights_stay_tied(tmp_path):
    config = flash_models.FlashBertConfig(**bert_config().to_dict(), position_embedding_type="rotary")
    model = flash_models.FlashBertForMaskedLM(config)
    model.save_pretrained(tmp_path)
    for tied in (model, copy.deepcopy(model), flash_models.FlashBertForMaskedLM.from_pretrained(tmp_path)):
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    model.resize_token_embeddings(VOCABULARY + 8)
    assert model.get_output_embeddings().weight is model.bert.embeddings.word_embeddings.weight
    assert model(token_ids()).logits.shape[-1] == VOCABULARY + 8


@pytest.mark.parametrize(
    "name, table", [("BertModel", "embeddings.position_embeddings.weight"), ("GPT2Model", "wpe.weight")]
)
def test_rotary_leaves_out_only_the_position_table(name, table, tmp_path):
    vanilla = vanilla_model(name)
    vanilla.save_pretrained(tmp_path / "vanilla")
    flash = load_exactly(flash_class(name), tmp_path / "vanilla", position_embedding_type="rotary")
    assert vanilla.state_dict().keys() - flash.state_dict().keys() == {table}
    assert all(torch.equal(weight, vanilla.state_dict()[key]) for key, weight in flash.state_dict().items())
    flash.save_pretrained(tmp_path / "flash")
    assert_same_weights(flash, load_exactly(transformers.AutoModel, tmp_path / "flash"))
    _, report = getattr(transformers, name).from_pretrained(tmp_path / "flash", output_loading_info=True)
    assert set(report["missing_keys"]) == {table} and not report["unexpected_keys"]


def test_every_head_of_transformers_is_here():
    from transformers.models.bert import modeling_bert
    from transformers.models.gpt2 import modeling_gpt2

    names = {*modeling_bert.__all__, *modeling_gpt2.__all__} - {
        "BertPreTrainedModel",
        "GPT2PreTrainedModel",
        "BertLayer",
    }
    assert names == HEADS.keys()
    assert {f"Flash{name}" for name in names} <= set(flash_models.__all__)
    for name in names:
        assert flash_class(name).__module__ in (bert.__name__, gpt2.__name__)


# pipelines


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "a", "dog", "ran", "##s", "."]


@pytest.fixture
def bert_folder(tmp_path):
    """A folder with nothing but a vocabulary: the Auto class of tokenizers has to know the model type."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


def test_fill_mask_pipeline(bert_folder):
    config = flash_models.FlashBertConfig(**bert_config(vocab_size=len(WORDS)).to_dict())
    flash_models.FlashBertForMaskedLM(config).save_pretrained(bert_folder)
    pipe = transformers.pipeline("fill-mask", model=str(bert_folder), device="cpu")
    assert isinstance(pipe.model, flash_models.FlashBertForMaskedLM)
    found = pipe("the cat [MASK] on the mat .", top_k=3)
    logits = pipe.model(**pipe.tokenizer("the cat [MASK] on the mat .", return_tensors="pt")).logits
    assert [answer["token"] for answer in found] == logits[0, 3].topk(3).indices.tolist()


def test_text_classification_pipeline(bert_folder):
    config = flash_models.FlashBertConfig(**bert_config(vocab_size=len(WORDS)).to_dict(), num_labels=3)
    flash_models.FlashBertForSequenceClassification(config).save_pretrained(bert_folder)
    pipe = transformers.pipeline("text-classification", model=str(bert_folder), device="cpu")
    texts = ["the cat sat", "a dog ran on the mat . the cats sat"]
    together, alone = pipe(texts, batch_size=2), [pipe(text)[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        assert one["label"] == other["label"] and one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_text_generation_pipeline(tmp_path):
    symbols = [*"abcdefgh", "\u0120", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({symbol: place for place, symbol in enumerate(symbols)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    config = gpt2_config(vocab_size=len(symbols), bos_token_id=9, eos_token_id=9, pad_token_id=9)
    flash_models.FlashGPT2LMHeadModel(flash_models.FlashGPT2Config(**config.to_dict())).save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    texts = ["abc abc", "a head"]
    alone = [pipe(text, **options)[0]["generated_text"] for text in texts]
    pipe.tokenizer.padding_side, pipe.tokenizer.pad_token_id = "left", 9
    together = [answer[0]["generated_text"] for answer in pipe(texts, batch_size=2, **options)]
    assert together == alone and all(alone)
