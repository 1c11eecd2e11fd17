# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `bias_gelu`. A program takes some columns of some rows and walks down the rows."""

import torch
import triton
import triton.language as tl

ROWS = 32  # a program's: enough that the partial sums of the bias's gradient are few
COLUMNS = 1024


@triton.jit
def _gelu_and_slope(x, TANH: tl.constexpr):
    if TANH:
        # 0.5 (1 + tanh u) is the sigmoid of 2 u, which does not overflow
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return x * share, slope


@triton.jit
def _forward_kernel(x, bias, out, rows, columns, HAS_BIAS: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):  # fmt: skip
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < columns
    shift = tl.zeros((COLUMNS,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        at = tl.cast(row, tl.int64) * columns + place
        value, _ = _gelu_and_slope(tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + shift, TANH)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dout, x, bias, dx, partial, rows, columns, HAS_BIAS: tl.constexpr, TANH: tl.constexpr,
                     ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < columns
    shift = tl.zeros((COLUMNS,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    first = tl.program_id(0) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        at = tl.cast(row, tl.int64) * columns + place
        _, slope = _gelu_and_slope(tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + shift, TANH)
        gradient = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
        total += gradient
    if HAS_BIAS:
        tl.store(partial + tl.program_id(0) * columns + place, total, mask=inside)


def _geometry(x):
    columns = x.shape[-1]
    rows = x.numel() // columns
    return rows, columns, (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))


def gelu_forward(x, bias, tanh):
    """gelu(x + bias) of a contiguous x."""
    rows, columns, grid = _geometry(x)
    out = torch.empty_like(x)
    if rows:
        with torch.cuda.device_of(x):
            _forward_kernel[grid](x, bias, out, rows, columns, bias is not None, tanh, ROWS, COLUMNS)
    return out


def gelu_backward(dout, x, bias, tanh):
    """dx, and the gradient of the bias in float32, None without one."""
    rows, columns, grid = _geometry(x)
    dx = torch.empty_like(x)
    # a row of a program's sums each
    partial = None if bias is None else x.new_empty(grid[0], columns, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(x):
            _backward_kernel[grid](dout, x, bias, dx, partial, rows, columns, bias is not None, tanh, ROWS, COLUMNS)
    return dx, None if bias is None else partial.sum(0)
