# SPDX-License-Identifier: Apache-2.0
"""Every head of BERT and GPT-2, tiny, with inputs and labels: what the tests that go over all of them share."""

import torch
import transformers
from tiny_models import LENGTH, bert_config, gpt2_config, padding, token_ids

BATCH, CHOICES = 3, 2


def _classes(_):
    return {"labels": torch.tensor([0, 1, 1])}


def _tokens(ids):
    return {"labels": ids.clone()}


def _token_classes(ids):
    return {"labels": ids % 2}


def _span(_):
    return {"start_positions": torch.tensor([1, 0, 3]), "end_positions": torch.tensor([2, 4, 3])}


def _pretraining(ids):
    return {"labels": ids.clone(), "next_sentence_label": torch.tensor([0, 1, 1])}


def _double(ids):
    return {"labels": ids.clone(), "mc_labels": torch.tensor([0, 1, 1]), "mc_token_ids": torch.tensor([[3, 9]] * BATCH)}


# name of the Hugging Face class: (Auto class that loads it, labels for token ids)
HEADS = {
    "BertModel": ("AutoModel", None),
    "BertForPreTraining": ("AutoModelForPreTraining", _pretraining),
    "BertLMHeadModel": ("AutoModelForCausalLM", _tokens),
    "BertForMaskedLM": ("AutoModelForMaskedLM", _tokens),
    "BertForNextSentencePrediction": ("AutoModelForNextSentencePrediction", _classes),
    "BertForSequenceClassification": ("AutoModelForSequenceClassification", _classes),
    "BertForMultipleChoice": ("AutoModelForMultipleChoice", _classes),
    "BertForTokenClassification": ("AutoModelForTokenClassification", _token_classes),
    "BertForQuestionAnswering": ("AutoModelForQuestionAnswering", _span),
    "GPT2Model": ("AutoModel", None),
    "GPT2LMHeadModel": ("AutoModelForCausalLM", _tokens),
    "GPT2DoubleHeadsModel": (None, _double),
    "GPT2ForSequenceClassification": ("AutoModelForSequenceClassification", _classes),
    "GPT2ForTokenClassification": ("AutoModelForTokenClassification", _token_classes),
    "GPT2ForQuestionAnswering": ("AutoModelForQuestionAnswering", _span),
}
HAS_CHOICES = ("BertForMultipleChoice", "GPT2DoubleHeadsModel")


def vanilla_model(name, **options):
    config = bert_config if name.startswith("Bert") else gpt2_config
    decoder = {"is_decoder": True} if name == "BertLMHeadModel" else {}
    return getattr(transformers, name)(config(**{"attn_implementation": "sdpa", **decoder, **options})).eval()


def inputs(name, device="cpu", padded="right"):
    """A padded batch, without labels and with."""
    ids, mask = token_ids(batch=BATCH), padding(padded, "cpu", BATCH)
    mask = torch.ones_like(ids) if mask is None else mask
    ids[mask == 0] = 0
    if name in HAS_CHOICES:
        ids = torch.stack([ids, ids.flip(0)], 1)
        mask = torch.stack([mask, mask.flip(0)], 1)
        assert ids.shape == (BATCH, CHOICES, LENGTH)
    batch = {"input_ids": ids, "attention_mask": mask}
    labels = HEADS[name][1](ids) if HEADS[name][1] else {}
    return [{key: value.to(device) for key, value in part.items()} for part in (batch, batch | labels)]


def tensors(output):
    return {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}
