# SPDX-License-Identifier: Apache-2.0
"""Logits that are computed when they are read, and not at all for a cross-entropy."""

import torch
from torch.nn import functional as F

from ..fused import linear_cross_entropy
from ..fused.dispatch import compute_dtype


class Logits:
    """`F.linear(hidden, weight, bias)`, to come: what a fused language-model head gives in training.

    hidden (..., N), weight (V, N), bias (V,) or None. The losses of transformers take it as a tensor: reshaped to
    (T, V), shifted by a slice of leading dimensions and widened to float32 it stays uncomputed, and
    `torch.nn.functional.cross_entropy` of it is `linear_cross_entropy`. Every other function, method, operator or
    attribute of tensors computes the tensor, once, and `tensor()` gives it. It is no torch.Tensor for isinstance.
    """

    def __init__(self, hidden, weight, bias, dtype=None, autocast=None):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.autocast = compute_dtype(hidden) if autocast is None else autocast  # of the product, also if read outside
        self.dtype = self.autocast if dtype is None else dtype
        self._version = None if torch.compiler.is_compiling() else weight._version
        self._tensor = None

    def tensor(self):
        """The logits (..., V), of `dtype`."""
        if self._tensor is None:
            if self._version not in (None, self.weight._version):
                raise RuntimeError(
                    "in training a fused model computes logits when they are read, and its weights have changed since "
                    "these were returned; read them before optimizer.step(), or patch the model without the fusion "
                    "'cross_entropy'"
                )
            with torch.autocast(self.hidden.device.type, enabled=False):
                parts = (t if t is None else t.to(self.autocast) for t in (self.hidden, self.weight, self.bias))
                self._tensor = F.linear(*parts).to(self.dtype)
        return self._tensor

    def _but(self, hidden=None, dtype=None):
        hidden, dtype = self.hidden if hidden is None else hidden, self.dtype if dtype is None else dtype
        return Logits(hidden, self.weight, self.bias, dtype, self.autocast)

    @property
    def shape(self):
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self):
        return self.hidden.device

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self):
        return self.hidden.dim()

    def float(self):
        return self._but(dtype=torch.float32)

    def contiguous(self):
        return self

    def view(self, *shape):
        if shape == (-1, self.weight.shape[0]):
            return self._but(self.hidden.reshape(-1, self.hidden.shape[-1]))
        return self.tensor().view(*shape)

    reshape = view

    def flatten(self, start_dim=0, end_dim=-1):
        if start_dim == 0 and end_dim in (-2, self.dim() - 2):
            return self._but(self.hidden.flatten(0, -2))
        return self.tensor().flatten(start_dim, end_dim)

    def __getitem__(self, index):
        if isinstance(index, tuple) and len(index) > 1 and index[0] is Ellipsis and index[-1] == slice(None):
            return self._but(self.hidden[index])
        return self.tensor()[index]

    def __getattr__(self, name):
        if name.startswith("__") or name in vars(type(self)):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __repr__(self):
        return f"Logits(shape={tuple(self.shape)}, dtype={self.dtype}), computed when read"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.cross_entropy:
            loss = _cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        return function(*_computed(args), **_computed(kwargs))


def _computed(value):
    """`value` with the tensor in the place of every Logits in it."""
    if isinstance(value, Logits):
        return value.tensor()
    if isinstance(value, dict):
        return {key: _computed(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_computed, value))
    return value


def _cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
):
    """The loss, in at least float32; None where the fused function has not what is asked for."""
    asked = weight is not None or size_average is not None or reduce is not None or label_smoothing
    if asked or reduction not in ("mean", "sum") or not isinstance(input, Logits) or input.dim() != 2:
        return None
    if target.dim() != 1 or target.is_floating_point():
        return None
    hidden = input.hidden.to(input.autocast)
    return linear_cross_entropy(hidden, input.weight, input.bias, target, ignore_index, reduction)


def _operator(name):
    def operate(self, *others):
        return getattr(self.tensor(), name)(*map(_computed, others))

    return operate


for _name in (
    *(
        "add",
        "radd",
        "sub",
        "rsub",
        "mul",
        "rmul",
        "truediv",
        "rtruediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "rmatmul",
    ),
    *("neg", "abs", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "invert", "len", "iter", "array", "bool"),
    *("int", "float", "setitem", "contains"),
):
    setattr(Logits, f"__{_name}__", _operator(f"__{_name}__"))
Logits.__hash__ = object.__hash__  # which an __eq__ takes away
