# SPDX-License-Identifier: Apache-2.0
"""The five tasks of the Long Range Arena (arXiv 2011.04006): what an example is, and the sizes of the models."""

import dataclasses

PAD, CLS, VOCABULARY = 256, 257, 258  # of every task: tokens are bytes, grey levels or the words of ListOps


@dataclasses.dataclass(frozen=True)
class Task:
    """max_length: tokens, [CLS] included. columns, label: of its rows in files and on the Hub. train_batch_size,
    num_steps: of a training; speed_batch_size: what standard attention, which keeps every score, fits into 80 GB."""

    max_length: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    train_batch_size: int
    num_steps: int
    speed_batch_size: int
    columns: tuple
    label: str = "label"
    dataset: str | None = None  # on the Hub
    names: tuple | None = None  # of the classes, where they are not those of the data

    @property
    def speed_length(self):
        return self.max_length - self.max_length % 2  # without the [CLS] of an image

    @property
    def sizes(self):
        """Fields of a BertConfig."""
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
        }


# Sizes, batches and steps of the benchmark's published base configurations. Its models of images differ from method to
# method; here they have the 3 and 4 layers of the paper's appendix.
TASKS = {
    "listops": Task(2048, 512, 6, 8, 2048, 32, 5_000, 16, ("Source",), "Target", names=tuple("0123456789")),
    "text": Task(4096, 256, 4, 4, 1024, 32, 20_000, 16, ("text",), dataset="stanfordnlp/imdb"),
    "retrieval": Task(4096, 128, 4, 4, 512, 32, 5_000, 8, ("text1", "text2")),
    "image": Task(1025, 64, 3, 4, 128, 256, 35_000, 256, ("img",), dataset="uoft-cs/cifar10"),
    "pathfinder": Task(1025, 128, 4, 8, 128, 256, 62_400, 128, (), names=("disconnected", "connected")),
}
