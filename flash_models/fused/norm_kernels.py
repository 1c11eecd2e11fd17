# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `dropout_add_norm` and its parts: a program holds a row in registers.

The dropout mask is not stored: the backward draws it again, Philox (Salmon et al., 2011) by seed and place.
"""

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def _kept(seed, row, p, BLOCK: tl.constexpr):
    """bool (BLOCK,): the places of a row that dropout keeps. A counter gives four numbers."""
    counter = row * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.randint4x(tl.load(seed), counter)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
    return (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.int32).to(tl.float32) * (1.0 / (1 << 24)) >= p


@triton.jit
def _forward_kernel(x, bias, residual, weight, shift, kept, out, statistics, seed, columns, eps, p,
                    HAS_X: tl.constexpr, HAS_BIAS: tl.constexpr, DROP: tl.constexpr, NORM: tl.constexpr,
                    KEEP_SUM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < columns
    at = row.to(tl.int64) * columns + place
    value = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_X:
        added = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            added += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            added = tl.where(_kept(seed, row, p, BLOCK), added / (1.0 - p), 0.0)
        value += added
        if KEEP_SUM:
            tl.store(kept + at, value.to(kept.dtype.element_ty), mask=inside)
    if NORM:
        average = tl.sum(value, 0) / columns
        centred = tl.where(inside, value - average, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / columns + eps)
        tl.store(statistics + row, average)
        tl.store(statistics + tl.num_programs(0) + row, inverse)
        normal = centred * inverse
        if not KEEP_SUM:
            tl.store(kept + at, normal.to(kept.dtype.element_ty), mask=inside)
        scaled = normal * tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        scaled += tl.load(shift + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dtotal, dout, kept, statistics, weight, seed, dx, dresidual, partial, rows, columns, p,
                     HAS_X: tl.constexpr, HAS_BIAS: tl.constexpr, DROP: tl.constexpr, NORM: tl.constexpr,
                     KEPT_SUM: tl.constexpr, HAS_DTOTAL: tl.constexpr, HAS_DRESIDUAL: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    place = tl.arange(0, BLOCK)
    inside = place < columns
    dbias = tl.zeros((BLOCK,), tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    factor = tl.zeros((BLOCK,), tl.float32)
    if NORM:
        factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    for row in range(program, rows, programs):
        at = tl.cast(row, tl.int64) * columns + place
        gradient = tl.zeros((BLOCK,), tl.float32)
        if NORM:
            inverse = tl.load(statistics + rows + row)
            normal = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
            if KEPT_SUM:
                normal = tl.where(inside, (normal - tl.load(statistics + row)) * inverse, 0.0)
            above = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
            dweight += above * normal
            dshift += above
            above *= factor
            along = tl.sum(above * normal, 0) / columns
            gradient = (above - tl.sum(above, 0) / columns - normal * along) * inverse
        if HAS_DTOTAL:
            gradient += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_DRESIDUAL:
            tl.store(dresidual + at, gradient.to(dresidual.dtype.element_ty), mask=inside)
        if HAS_X:
            if DROP:
                gradient = tl.where(_kept(seed, row, p, BLOCK), gradient / (1.0 - p), 0.0)
            tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
            dbias += gradient
    sums = partial + program * columns + place
    if HAS_BIAS:
        tl.store(sums, dbias, mask=inside)
        sums += programs * columns
    if NORM:
        tl.store(sums, dweight, mask=inside)
        tl.store(sums + programs * columns, dshift, mask=inside)


@functools.cache
def _launch(columns):
    """(length of the block, options): 8 values of a row a thread, 16 bytes in bfloat16."""
    block = max(triton.next_power_of_2(columns), 32)
    return block, {"num_warps": min(max(block // 256, 1), 16)}


def norm_forward(x, bias, residual, weight, shift, eps, p, seed, keep_sum, kept_dtype, dtype):
    """(what is kept for the backward, in `kept_dtype`, normalised in `dtype`, float32 (2, rows) of means and 1 /
    standard deviations); the last two None without weight. Kept is the sum, or without `keep_sum`, which needs an x and
    a weight, the normalised sum before weight and shift."""
    x, residual = None if x is None else x.contiguous(), residual.contiguous()
    columns = residual.shape[-1]
    rows = residual.numel() // columns
    kept = residual if x is None else residual.new_empty(residual.shape, dtype=kept_dtype)
    out = statistics = None
    if weight is not None:
        out = residual.new_empty(residual.shape, dtype=dtype)
        statistics = residual.new_empty(2, rows, dtype=torch.float32)
    block, options = _launch(columns)
    if rows:
        with torch.cuda.device_of(residual):
            _forward_kernel[(rows,)](
                x, bias, residual, weight, shift, kept, out, statistics, seed, columns, eps, p,
                x is not None, bias is not None, seed is not None, weight is not None, keep_sum, block, **options,
            )  # fmt: skip
    return kept, out, statistics


def norm_backward(dtotal, dout, kept, statistics, weight, seed, p, kept_sum, x_dtype, residual_dtype, has_bias):
    """(dx or None, dresidual, gradients of bias, weight and shift): the last three float32 (columns,), None without a
    bias and without `dout`. dtotal or dout may be None; dresidual is dtotal itself where that is the gradient."""
    dtotal, dout = (None if t is None else t.contiguous() for t in (dtotal, dout))
    like = dout if dout is not None else dtotal
    columns = like.shape[-1]
    rows = like.numel() // columns
    block, options = _launch(columns)
    programs = min(rows, _programs(like.device, options["num_warps"]))
    # without the norm the residual's gradient is that of the sum
    passed = dout is None and dtotal.dtype == residual_dtype
    dresidual = None if passed else like.new_empty(like.shape, dtype=residual_dtype)
    dx = None if x_dtype is None else like.new_empty(like.shape, dtype=x_dtype)
    # a row of a program's sums each
    partial = like.new_empty(has_bias + 2 * (dout is not None), programs, columns, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(like):
            _backward_kernel[(programs,)](
                dtotal, dout, kept, statistics, weight, seed, dx, dresidual, partial, rows, columns, p,
                dx is not None, has_bias, seed is not None, dout is not None, kept_sum, dtotal is not None,
                dresidual is not None, block, **options,
            )  # fmt: skip
    sums = list(partial.sum(1).unbind()) if len(partial) else []
    dbias = sums.pop(0) if has_bias else None
    return dx, dtotal if passed else dresidual, dbias, *(sums or (None, None))


@functools.cache
def _programs(device, num_warps):
    """As many as run at once: with their registers, 20 warps on a multiprocessor."""
    if device.type != "cuda":
        return 4  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, 20 // num_warps)
