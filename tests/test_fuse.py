# SPDX-License-Identifier: Apache-2.0
"""patch(model, fuse=...): the same losses, logits and gradients as transformers, and what it leaves behind."""

import copy
import pickle

import pytest
import torch
import transformers
from eval_case import fresh_accelerate  # noqa: F401
from head_models import HEADS, inputs, tensors, vanilla_model
from peft import LoraConfig, get_peft_model
from tiny_models import MODELS, assert_all_same, assert_same, token_ids, working_dtype
from torch.nn import functional as F

from flash_models import FlashBertConfig, FlashBertForMaskedLM, patch, unpatch
from flash_models.models.fusing import FUSIONS
from flash_models.models.logits import Logits

pytestmark = pytest.mark.usefixtures("strict")
NO_DROPOUT = {"summary_first_dropout": 0.0, "classifier_dropout": 0.0, "hidden_dropout": 0.0}
LM_HEADS = [name for name in HEADS if name.startswith("GPT2LM") or name in ("BertForMaskedLM", "BertLMHeadModel")]


def build(name, **options):
    return vanilla_model(name, **(NO_DROPOUT if name.startswith("GPT2") else {}), **options).train()


def triplet(name, device, fuse=True, **options):
    """(fused, plain, truth), as in tiny_models."""
    truth = build(name, **options).to(device)
    plain = copy.deepcopy(truth).to(working_dtype(device))
    return patch(copy.deepcopy(plain), fuse=fuse, unpad=options.get("unpad", False)), plain, truth


def loss_of(output):
    losses = [value for key, value in output.items() if "loss" in key and value is not None]
    return sum(losses or [value.square().mean() for value in tensors(output).values()])


def read(output):
    return {key: value.tensor() if isinstance(value, Logits) else value for key, value in output.items()}


def compare(models, batch, **options):
    """Results and gradients."""
    results, gradients = [], []
    for model in models:
        output = model(**batch, **options)
        loss_of(output).backward()
        found = tensors(read(output))
        found.pop("last_hidden_state", None)  # of padding, which is nobody's
        results.append({key: value.detach() for key, value in found.items()})
        gradients.append({key: weight.grad for key, weight in model.named_parameters()})
    assert_all_same(*results)
    assert_all_same(*gradients)


@pytest.mark.parametrize("name", HEADS)
def test_every_head(device, name):
    compare(triplet(name, device), inputs(name, device, "none")[1])


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_every_fusion_alone(device, name, fusion):
    fused, *others = triplet(name, device, fuse=fusion)
    classes = {type(module) for module in fused.modules() if type(module).__module__.startswith("flash_models")}
    assert classes or fusion == "cache"
    compare((fused, *others), inputs(name, device)[1])


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_fast", "relu"])
def test_activations(device, activation):
    compare(triplet("BertForMaskedLM", device, hidden_act=activation), inputs("BertForMaskedLM", device)[1])


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_with_unpad(device, name):
    truth = build(name).to(device)
    plain = copy.deepcopy(truth).to(working_dtype(device))
    batch = inputs(name, device)[1]
    if name == "BertForMaskedLM":
        batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["labels"], -100)
    models = patch(copy.deepcopy(plain), fuse=True, unpad=True), plain, truth
    results = [model(**batch).loss for model in models]
    assert_same(*results)
    for result in results:
        result.backward()
    assert_all_same(*({key: weight.grad for key, weight in model.named_parameters()} for model in models))


@pytest.mark.parametrize("name", LM_HEADS)
def test_labels_in_part_and_not_at_all(device, name):
    models = triplet(name, device)
    batch = inputs(name, device)[1]
    batch["labels"][:, ::3] = -100
    compare(models, batch)
    batch["labels"][:] = -100
    for model in models:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        assert loss.isnan()
        assert all(w.grad is None or not w.grad.any() for w in model.parameters())


def test_num_items_in_batch_and_accumulation(device):
    models = triplet("GPT2LMHeadModel", device)
    batches = [inputs("GPT2LMHeadModel", device)[1] for _ in range(2)]
    batches[1]["labels"][:, :9] = -100
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    for model in models:
        for batch in batches:
            model(**batch, num_items_in_batch=count).loss.backward()
    assert_all_same(*({key: weight.grad for key, weight in model.named_parameters()} for model in models))


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("name", MODELS)
def test_trainer(name, tmp_path):
    """With accumulated gradients; its evaluation reads logits."""
    base, data, results = MODELS[name](), [{"input_ids": ids, "labels": ids.clone()} for ids in token_ids(batch=8)], []
    for fuse in (False, True):
        model = patch(copy.deepcopy(base), fuse=fuse)
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "report_to": []}
        options |= {"learning_rate": 1e-3, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(tmp_path, **options),
            train_dataset=data,
            eval_dataset=data,
            compute_metrics=lambda found: {"mean": found.predictions.mean()},
        )
        results.append([trainer.train().training_loss, *map(trainer.evaluate().get, ("eval_loss", "eval_mean"))])
    assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_dropout_and_checkpointing(device, name):
    """Recomputed activations have the same masks; on a CPU these are drawn as transformers draws them."""
    options = {"hidden_dropout_prob": 0.2} if name[0] == "B" else {"resid_pdrop": 0.2, "embd_pdrop": 0.2}
    fused, plain, truth = triplet(name, device, **options)
    again = copy.deepcopy(fused)
    again.gradient_checkpointing_enable()
    batch, gradients = inputs(name, device)[1], []
    for model in (fused, plain, truth, again):
        torch.manual_seed(3)
        model(**batch).loss.backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters()})
    if device.type == "cpu":
        assert_all_same(*gradients[:3])
    for key, gradient in gradients[0].items():  # a GPU adds in any order
        size = gradient.abs().max().item()
        torch.testing.assert_close(
            gradients[3][key], gradient, rtol=0, atol=(1e-5 if device.type == "cpu" else 0.02) * size
        )


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_autocast(device, name):
    """As near to float32 as transformers under autocast."""
    truth = build(name).to(device)
    plain, fused = copy.deepcopy(truth), patch(copy.deepcopy(truth), fuse=True)
    batch, gradients = inputs(name, device)[1], []
    for model in (fused, plain, truth):
        with torch.autocast(device.type, torch.bfloat16, enabled=model is not truth):
            model(**batch).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    ours, theirs = ((gradient - gradients[2]).norm() for gradient in gradients[:2])
    assert 0 < theirs < 0.1 * gradients[2].norm() and ours <= 1.5 * theirs


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining", *LM_HEADS[::2], "GPT2Model"])
def test_compiled_in_one_graph(device, name):
    torch._dynamo.reset()
    models = triplet(name, device)
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    batch, results = inputs(name, device, padded="none")[1], []
    for model in (compiled, *models[1:]):
        output = model(**batch)
        if model is compiled and name in LM_HEADS:  # the vocabulary is not projected to in the graph
            assert isinstance(output.logits, Logits) and list(output)[0] == "loss"
        loss_of(output).backward()
        results.append({key: value.detach() for key, value in tensors(read(output)).items()})
    assert_all_same(*results)
    assert_all_same(*({key: weight.grad for key, weight in model.named_parameters()} for model in models))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the graph has the kernels' ops on CUDA alone")
def test_a_deep_model_compiles():
    """Inductor of torch 2.11 would describe the loss's input by all ways through the layers."""
    torch._dynamo.reset()
    config = transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=24, n_head=2, n_positions=64)
    model = patch(transformers.GPT2LMHeadModel(config).cuda(), fuse=True).train()
    ids = token_ids(device="cuda") % 97
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.compile(model, fullgraph=True)(ids, labels=ids).loss
    loss.backward()
    assert 4 < loss.item() < 5.5 and all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("name", LM_HEADS)
def test_unpatch_restores_exactly(name):
    model = build(name)
    before = [(type(module), set(vars(module))) for module in model.modules()]
    loss_type, keys = model.loss_type, list(model.state_dict())
    patch(model, fuse=True)
    assert patch(model, fuse=True) is model and list(model.state_dict()) == keys
    names = [type(module).__name__ for module in model.modules()]  # by which FSDP and device_map find layers
    assert names == [cls.__name__ for cls, _ in before]
    unpatch(model)
    assert [(type(module), set(vars(module))) for module in model.modules()] == before and model.loss_type == loss_type


@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_checkpoints(name, tmp_path):
    model = patch(MODELS[name](), fuse=True).train()
    ids = token_ids()
    loss = model(ids, labels=ids).loss
    classes = [type(module) for module in model.modules()]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids, labels=ids).loss, loss)
        assert [type(module) for module in copied.modules()] == classes
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert loaded.config.architectures == [type(loaded).__name__]
    assert torch.allclose(loaded(ids, labels=ids).loss, loss)


def test_flash_models_are_fused_by_their_config(tmp_path):
    config = FlashBertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, fuse=True)
    FlashBertForMaskedLM(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).train()
    ids = token_ids()
    assert isinstance(unpatch(patch(model, fuse=True))(ids).logits, Logits)  # its own stays
    with pytest.raises(ValueError, match="unknown fusion 'gelo'"):
        FlashBertForMaskedLM(FlashBertConfig(fuse=["gelo"]))


def test_adapters_on_every_layer(device):
    """LoRA replaces the linear layers: what they add is not lost, and only they are trained."""
    truth = build("GPT2LMHeadModel").to(device)
    config = LoraConfig(target_modules=["c_attn", "c_proj", "c_fc", "lm_head"], r=4, fan_in_fan_out=True)
    config.init_lora_weights = False
    torch.manual_seed(0)
    truth = get_peft_model(truth, config)
    plain = copy.deepcopy(truth).to(working_dtype(device))
    compare((patch(copy.deepcopy(plain), fuse=True), plain, truth), inputs("GPT2LMHeadModel", device)[1])


def test_logits_are_computed_when_read():
    fused, _, truth = triplet("GPT2LMHeadModel", torch.device("cpu"))
    batch = inputs("GPT2LMHeadModel")[1]
    output, expected = fused(**batch), truth(**batch).logits
    logits = output.logits
    assert isinstance(logits, Logits) and logits.shape == expected.shape and logits._tensor is None
    torch.testing.assert_close(logits.softmax(-1), expected.softmax(-1))
    torch.testing.assert_close(torch.argmax(logits, -1), expected.argmax(-1))
    torch.testing.assert_close((2 * logits - expected)[0, :3], expected[0, :3])
    torch.testing.assert_close(logits[..., :-1, :].tensor(), expected[..., :-1, :])
    flat, labels = logits.reshape(-1, 97), batch["labels"].view(-1)
    for options in ({"label_smoothing": 0.1}, {"reduction": "none"}, {"weight": torch.rand(97)}, {"reduction": "sum"}):
        own = F.cross_entropy(flat, labels, **options)
        torch.testing.assert_close(own, F.cross_entropy(expected.view(-1, 97), labels, **options))
    assert isinstance(fused.eval()(**batch).logits, torch.Tensor)
    with torch.no_grad():
        assert isinstance(fused.train()(**batch).logits, torch.Tensor)
    late = fused(**batch)
    with torch.no_grad():
        fused.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"read them before optimizer.step\(\)"):
        late.logits.argmax(-1)


def test_unknown_fusions_are_refused():
    model = MODELS["bert"]()
    with pytest.raises(ValueError, match="unknown fusion 'glue'.*cross_entropy"):
        patch(model, fuse={"glue", "gelu"})
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_fused_gradients_are_rounded_no_more(name, device):
    """bfloat16 autocast, 12 layers: what is rounded once more a layer would add up."""
    torch.manual_seed(0)
    layers = {"n_layer": 12} if name.startswith("GPT2") else {"num_hidden_layers": 12}
    truth = build(name, **layers).to(device)
    ids = token_ids(device, 2)

    def gradient(model, autocast):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    plain, fused = (patch(copy.deepcopy(truth), fuse=fuse) for fuse in (False, True))
    exact = gradient(truth, False)
    ours, theirs = ((gradient(model, True) - exact).norm() for model in (fused, plain))
    assert ours <= 1.3 * theirs
