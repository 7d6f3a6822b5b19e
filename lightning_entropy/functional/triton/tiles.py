r"""What the kernels of attention with entropy share. Importing this module imports triton.

Logits are kept in base 2, since ``exp2`` is what the hardware has. Keys beyond the end are taken out before *p* is
formed: padded with zeros they would have the logit 0 and count.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

# Where a running maximum starts: below every logit, and finite, so that its first difference times 0 is 0, not NaN.
LOWEST = tl.constexpr(-1.0e37)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(
    pointer, rows, columns, n_rows, n_columns, stride_row, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr
):
    """A tile with unit stride along its columns; zeros outside."""
    at = pointer + rows[:, None] * stride_row + columns[None, :]
    if CHECK_ROWS and CHECK_COLUMNS:
        return tl.load(at, mask=(rows[:, None] < n_rows) & (columns[None, :] < n_columns), other=0.0)
    elif CHECK_ROWS:
        return tl.load(at, mask=rows[:, None] < n_rows, other=0.0)
    elif CHECK_COLUMNS:
        return tl.load(at, mask=columns[None, :] < n_columns, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def capped_logits(s, to_base2, to_tanh, SOFTCAP: tl.constexpr):
    """Logits in base 2 from products q.k, and the tanh of soft-capping (else the products, unused)."""
    if SOFTCAP:
        # tanh from exp2 of a negative number, which cannot overflow
        e = tl.exp2(tl.abs(s * to_tanh) * (-2.0 * LOG2E))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(s * to_tanh < 0, -t, t)
        return t * to_base2, t
    else:
        return s * to_base2, s


@triton.jit
def allowed(rows, columns, n_rows, n_keys, mask, stride_row, stride_column, CAUSAL: tl.constexpr, MASK: tl.constexpr):
    """Which of a tile's entries take part: inside the keys, not in the future, in the mask (1 keys only, 2 full)."""
    ok = (columns < n_keys) & (rows >= 0)  # broadcasts to the tile
    if CAUSAL:
        ok = ok & (columns <= rows)
    if MASK == 1:
        ok = ok & (tl.load(mask + columns.to(tl.int64) * stride_column, mask=columns < n_keys, other=0) != 0)
    elif MASK == 2:
        at = mask + rows.to(tl.int64) * stride_row + columns.to(tl.int64) * stride_column
        ok = ok & (tl.load(at, mask=(columns < n_keys) & (rows < n_rows), other=0) != 0)
    return ok


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """A tile as a product takes it. The interpreter multiplies the bits of bfloat16, so that it is given float32."""
    if PRECISION == "emulated":
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a b`` in float32, without TF32."""
    return tl.dot(operand(a, PRECISION), operand(b, PRECISION), total, input_precision="ieee")
