"""Kernels of CRReLU. Importing this module imports triton.

``parameters`` holds eps, mu, sigma and 1 / sigma of all channels, one kind after the other.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import math

import triton
import triton.language as tl

HALF_LOG2E = tl.constexpr(0.5 * math.log2(math.e))
FAR_AWAY = tl.constexpr(40.0)


@triton.jit
def _standardized(x, parameters, c, channels, PLAIN: tl.constexpr):
    """The standardised input, 0 where its Gaussian is 0 (infinity times 0 does not occur), and that Gaussian."""
    if PLAIN:
        z = x
    else:
        z = (x - tl.load(parameters + channels + c)) * tl.load(parameters + 3 * channels + c)
    far = tl.abs(z) >= FAR_AWAY  # false for NaN, which goes on as NaN
    t = tl.where(far, 0.0, z)
    return t, tl.where(far, 0.0, tl.exp2(-t * t * HALF_LOG2E))


@triton.jit
def _slope(x, g, parameters, c, channels, PLAIN: tl.constexpr):
    """Gradient of x, and what each element adds to the gradient of eps."""
    t, gaussian = _standardized(x, parameters, c, channels, PLAIN)
    weighted = gaussian * g
    product = t * weighted
    slope = tl.where(x <= 0.0, 0.0, g) + tl.load(parameters + c) * (weighted - t * product)
    if not PLAIN:
        product = product * tl.load(parameters + 2 * channels + c)
    return slope, product


@triton.jit
def forward_kernel(x, y, parameters, n, channels, inner, PLAIN: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """A program computes ``BLOCK`` neighbouring elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    if ONE:
        c = 0
    else:
        c = (at // inner) % channels
    z = tl.load(x + at, inside, other=0.0).to(tl.float32)
    t, gaussian = _standardized(z, parameters, c, channels, PLAIN)
    bump = t * gaussian
    if not PLAIN:
        bump = bump * tl.load(parameters + 2 * channels + c)
    value = tl.where(z < 0.0, 0.0, z) + tl.load(parameters + c) * bump
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


@triton.jit
def backward_rows_kernel(x, grad, grad_x, sums, parameters, channels, inner, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    """A program walks over every ``num_programs(0)``-th block of a row, which has one eps."""
    block = tl.program_id(0)
    row = tl.program_id(1)
    wide = tl.num_programs(0)
    c = row % channels
    start = row.to(tl.int64) * inner
    inside = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(block * BLOCK, inner, wide * BLOCK):
        at = tl.cast(first, tl.int64) + inside
        ok = at < inner
        z = tl.load(x + start + at, ok, other=0.0).to(tl.float32)
        g = tl.load(grad + start + at, ok, other=0.0).to(tl.float32)
        slope, product = _slope(z, g, parameters, c, channels, PLAIN)
        total += tl.where(ok, product, 0.0)
        tl.store(grad_x + start + at, slope.to(grad_x.dtype.element_ty), ok)
    tl.store(sums + row.to(tl.int64) * wide + block, tl.sum(total, 0))


@triton.jit
def backward_columns_kernel(
    x, grad, grad_x, sums, parameters, rows, channels,
    PLAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PROGRAM_ROWS: tl.constexpr,
):  # fmt: skip
    """A program walks down ``PROGRAM_ROWS`` rows of ``COLUMNS`` columns, each of which has its own eps."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    down = tl.program_id(1)
    real = c < channels
    # A column that is not there reads the parameters of the first.
    own = tl.where(real, c, 0)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, PROGRAM_ROWS, ROWS):
        row = down.to(tl.int64) * PROGRAM_ROWS + first + tl.arange(0, ROWS)
        ok = (row < rows)[:, None] & real[None, :]
        at = row[:, None] * channels + c[None, :]
        z = tl.load(x + at, ok, other=0.0).to(tl.float32)
        g = tl.load(grad + at, ok, other=0.0).to(tl.float32)
        slope, product = _slope(z, g, parameters, own[None, :], channels, PLAIN)
        total += tl.sum(tl.where(ok, product, 0.0), 0)
        tl.store(grad_x + at, slope.to(grad_x.dtype.element_ty), ok)
    tl.store(sums + down.to(tl.int64) * channels + c, total, real)
