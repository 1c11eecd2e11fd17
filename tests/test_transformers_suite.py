# SPDX-License-Identifier: Apache-2.0
"""transformers' own tests of every model, run on its BERT and GPT-2 with `io_aware`.

They come from its source distribution, of the installed version, which `make transformers-tests` fetches. That holds
what all models share (ModelTesterMixin), not the generation, export and per-model tests; those modules are empty here.
"""

import importlib
import os
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
import transformers
from head_models import HEADS
from tiny_models import VOCABULARY, bert_config, gpt2_config

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("TRANSFORMERS_SOURCE is not set: see `make transformers-tests`", allow_module_level=True)
pytest.importorskip("parameterized")


def _common_tests():
    """The module tests/test_modeling_common.py of the source distribution, in a package without what is not shipped."""
    folder = Path(SOURCE) / "tests"
    for name, attributes in {
        "transformers_tests": {"__path__": [str(folder)]},
        "transformers_tests.exporters": {"__path__": []},
        "transformers_tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "transformers_tests.generation": {"__path__": []},
        "transformers_tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
    return importlib.import_module("transformers_tests.test_modeling_common")


common = _common_tests()


class Tester:
    """What the common tests ask for: a small config and a batch of inputs."""

    batch_size, seq_length, num_choices, is_training = 5, 7, 3, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 2, VOCABULARY

    def __init__(self, make_config):
        self.make_config = make_config

    def get_config(self):
        return self.make_config(attn_implementation="io_aware", initializer_range=0.02)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, VOCABULARY, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[:, -1] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Common(common.ModelTesterMixin, common.GenerationTesterMixin):
    def setUp(self):
        self.model_tester = Tester(type(self).make_config)
        assert self.model_tester.get_config()._attn_implementation == "io_aware"
        if self._testMethodName.startswith("test_training"):  # as in transformers: its loss leaves a head out
            self.all_model_classes = tuple(set(self.all_model_classes) - {transformers.GPT2DoubleHeadsModel})

    def _prepare_config_and_inputs_for_retain_grad_hidden_states_attentions(self):
        """A test of eager attention, which switches to it only after config.output_attentions."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        return config, inputs

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Labels also for the head that has two kinds of them, as in transformers' tests of BERT."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is transformers.BertForPreTraining:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            inputs["next_sentence_label"] = inputs["labels"][:, 0]
        return inputs


def classes(prefix):
    return tuple(getattr(transformers, name) for name in HEADS if name.startswith(prefix))


class TestBert(Common, unittest.TestCase):
    make_config = staticmethod(bert_config)
    all_model_classes = classes("Bert")


class TestGPT2(Common, unittest.TestCase):
    make_config = staticmethod(gpt2_config)
    all_model_classes = classes("GPT2")


del Common
