# SPDX-License-Identifier: Apache-2.0
"""Classifiers of the Long Range Arena: one BERT for every attention that is compared."""

import torch
from tasks.lra_baselines import BASELINES, add_weights
from tasks.lra_tasks import PAD, TASKS, VOCABULARY
from torch import nn

from flash_models import FlashBertConfig, FlashBertForSequenceClassification

ATTENTIONS = {  # name: attn_implementation
    "standard": "eager",
    "sdpa": "sdpa",
    "flash": "io_aware",
    "block_sparse": "io_aware",
    **{name: name for name in BASELINES},
}
BLOCK_SPARSE = {"pattern": "butterfly", "block_size": 64}  # the fixed pattern of arXiv 2205.14135


class PairHead(nn.Module):
    """Classifies pairs, rows 2 i and 2 i + 1, by [a, b, a * b, a - b]: (2 B, hidden) to (B, labels)."""

    def __init__(self, config):
        super().__init__()
        self.hidden = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled):
        a, b = pooled.unflatten(0, (-1, 2)).unbind(1)
        return self.out(self.hidden(torch.cat((a, b, a * b, a - b), -1)).relu())


class LraClassifier(FlashBertForSequenceClassification):
    """config.lra_task: "retrieval" classifies pairs; config.lra_attention: a name in ATTENTIONS."""

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "lra_task", None) == "retrieval":
            self.classifier = PairHead(config)
        add_weights(self, getattr(config, "lra_attention", "flash"))
        # All tokens are of one type: the gradient of that lookup would add up B * S rows one by one.
        self.bert.embeddings.token_type_embeddings.weight.requires_grad_(False)


def new_config(name, attention, labels, max_length=None, dropout=0.1, positions="absolute", block_sparse=None, **sizes):
    """FlashBertConfig of a new model. labels: names of the classes; sizes: other than the task's.

    initializer_range gives queries and keys the scale that 0.02 gives them at BERT-base's width."""
    task = TASKS[name]
    sizes = {**task.sizes, **sizes}
    if positions != "absolute" and ATTENTIONS[attention] != "io_aware":
        raise ValueError(f"{positions} positions are for flash and block_sparse; {attention} would leave them out")
    return FlashBertConfig(
        **sizes,
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        max_position_embeddings=max_length or task.max_length,
        position_embedding_type=positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.02 * (768 / sizes["hidden_size"]) ** 0.5,
        block_sparse=(block_sparse or dict(BLOCK_SPARSE)) if attention == "block_sparse" else None,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        problem_type="single_label_classification",
        lra_task=name,
        lra_attention=attention,
    )


def create_model(config):
    """A new LraClassifier on its attention."""
    model = LraClassifier(config)
    model.set_attn_implementation(ATTENTIONS[config.lra_attention])
    return model


def load_model(path):
    """An LraClassifier, or any FlashBertForSequenceClassification, of a folder or Hub id."""
    model = LraClassifier.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    model.set_attn_implementation(ATTENTIONS[getattr(model.config, "lra_attention", "flash")])
    return model
