# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `linear_cross_entropy`: a program turns a row of logits into their gradient."""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(logits, labels, losses, vocabulary, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    logits += row.to(tl.int64) * columns
    chosen = tl.load(logits + label, mask=label >= 0, other=0.0).to(tl.float32)
    place = tl.arange(0, BLOCK)
    largest, total = -float("inf"), 0.0
    # masks by the columns, a multiple of 64, and not by the vocabulary: these let a thread load 16 bytes at once
    for first in range(0, columns, BLOCK):
        column = first + place
        value = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32)
        value = tl.where(column < vocabulary, value, -float("inf"))
        before = largest
        largest = tl.maximum(before, tl.max(value, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(value - largest), 0)
    log_sum = largest + tl.log(total)
    tl.store(losses + row, tl.where(label >= 0, log_sum - chosen, 0.0))
    for first in range(0, columns, BLOCK):
        column = first + place
        value = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32)
        value = tl.where(column < vocabulary, value, -float("inf"))
        gradient = tl.exp(value - log_sum) - tl.where(column == label, 1.0, 0.0)
        gradient = tl.where(label >= 0, gradient, 0.0)
        tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < columns)


def softmax_gradient_(logits, labels, vocabulary):
    """See `cross_entropy._softmax_gradient_`; logits contiguous."""
    rows, columns = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    if rows:
        block = min(triton.next_power_of_2(columns), 8192)
        num_warps = min(max(block // 512, 1), 16)
        with torch.cuda.device_of(logits):
            _kernel[(rows,)](logits, labels, losses, vocabulary, columns, block, num_warps=num_warps)
    return losses
