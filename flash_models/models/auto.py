# SPDX-License-Identifier: Apache-2.0
"""How Hugging Face's Auto classes find the models of this library.

In a program that imports it they find them by registration. Elsewhere, with `trust_remote_code=True`, they find them by
the stub that lies in every saved checkpoint: a file that imports this library, named by the `auto_map` of config.json.
"""

import textwrap
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

_STUB = """\
# SPDX-License-Identifier: Apache-2.0
try:
    from flash_models.models import (
{names}
    )
except ModuleNotFoundError as error:
    raise ImportError(f"{{error}}; this checkpoint needs flash-models: pip install flash-models") from error
"""
_auto_maps = {}  # config class -> {name of an Auto class: "module.class" in the stub}


def register(config_class, tokenizer_class, model_classes):
    """Make known to transformers: a config class, its tokenizer class, and {Auto class: model class}."""
    AutoConfig.register(config_class.model_type, config_class)
    AutoTokenizer.register(config_class, tokenizer_class)
    for auto_class, model_class in model_classes.items():
        auto_class.register(config_class, model_class)
    stub = f"modeling_{config_class.model_type}"
    known = {AutoConfig: config_class, **model_classes}
    _auto_maps[config_class] = {auto.__name__: f"{stub}.{known_class.__name__}" for auto, known_class in known.items()}


def write_stub(config, folder):
    """Write the stub of `config`'s models into `folder`, and its auto_map into `config`.

    A subclass that is not registered has no stub: its code is not in this library.
    """
    auto_map = _auto_maps.get(type(config))
    if auto_map is None:
        return
    config.auto_map = dict(auto_map)
    modules, names = zip(*(reference.split(".") for reference in auto_map.values()), strict=True)
    lines = textwrap.fill(", ".join(sorted(set(names))) + ",", 120, initial_indent=" " * 8, subsequent_indent=" " * 8)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{modules[0]}.py").write_text(_STUB.format(names=lines), encoding="utf-8")


class OwnCode:
    """Of a class that the stub imports: transformers is not to copy its source file into checkpoints."""

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs):
        """As in transformers for a subclass outside this library; otherwise nothing."""
        if not cls.__module__.startswith(__package__):
            super().register_for_auto_class(*args, **kwargs)
