r"""Attention and its entropy in one pass over the keys. Importing this module imports triton.

A program holds a tile of queries and walks over the keys. With logits *s*, running maximum *m* (``top``),
:math:`l = \sum_j e^{s_j - m}` (``total``) and :math:`e = \sum_j e^{s_j - m} (s_j - m)` (``moment``), a row ends with

.. math:: \ell = m + \log l, \qquad H = \log l - e / l

where no large numbers cancel: both terms are relative to the largest logit.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from lightning_entropy.functional.triton.tiles import LN2, LOWEST, allowed, capped_logits, dot, load_tile


@triton.jit
def _forward_blocks(
    acc, top, total, moment, q, k, v, mask, first, last, rows, n_rows, n_keys, width, value_width,
    stride_k, stride_v, stride_mask_row, stride_mask_key, to_base2, to_tanh,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, VALUE: tl.constexpr, CHECK: tl.constexpr,
    PAD: tl.constexpr, PAD_VALUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks from ``first`` to ``last``; CHECK where an entry may have to be left out."""
    inside = tl.arange(0, BLOCK_K)
    across = tl.arange(0, WIDTH)
    across_value = tl.arange(0, VALUE_WIDTH)
    for start in range(first, last, BLOCK_K):
        offset = tl.cast(start, tl.int64)
        k_tile = load_tile(k + offset * stride_k, inside, across, n_keys - start, width, stride_k, CHECK, PAD)
        s = dot(q, tl.trans(k_tile), None, PRECISION)
        s, _ = capped_logits(s, to_base2, to_tanh, SOFTCAP)
        if CHECK:
            ok = allowed(
                rows[:, None], (start + inside)[None, :], n_rows, n_keys, mask, stride_mask_row, stride_mask_key,
                CAUSAL, MASK,
            )  # fmt: skip
            new = tl.maximum(top, tl.max(tl.where(ok, s, LOWEST), 1))
            z = tl.where(ok, s - new[:, None], 0.0)
            p = tl.where(ok, tl.exp2(z), 0.0)
        else:
            new = tl.maximum(top, tl.max(s, 1))
            z = s - new[:, None]
            p = tl.exp2(z)
        step = top - new
        decay = tl.exp2(step)
        moment = decay * (moment + step * total) + tl.sum(p * z, 1)
        total = decay * total + tl.sum(p, 1)
        top = new
        if VALUE:
            v_tile = load_tile(
                v + offset * stride_v, inside, across_value, n_keys - start, value_width, stride_v, CHECK, PAD_VALUE
            )
            acc = dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], PRECISION)
    return acc, top, total, moment


@triton.jit
def forward_kernel(
    query, key, value, mask, output, entropy, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ob, stride_oh, stride_on,
    heads, groups, n_queries, n_keys, width, value_width, to_base2, to_tanh,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, VALUE: tl.constexpr,
    PAD: tl.constexpr, PAD_VALUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Output, entropy and log-sum-exp of one tile of queries."""
    blocks = tl.cdiv(n_queries, BLOCK_Q)
    pair = tl.program_id(0) // blocks
    tile = tl.program_id(0) % blocks
    if CAUSAL:
        tile = blocks - 1 - tile  # the longest rows first
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    start = tile * BLOCK_Q
    inside = tl.arange(0, BLOCK_Q)
    rows = start + inside
    offset = start.to(tl.int64)
    q = load_tile(
        query + batch * stride_qb + head * stride_qh + offset * stride_qn, inside, tl.arange(0, WIDTH),
        n_queries - start, width, stride_qn, True, PAD,
    )  # fmt: skip
    k = key + batch * stride_kb + (head // groups) * stride_kh
    v = value + batch * stride_vb + (head // groups) * stride_vh
    mask_pair = mask + batch * stride_mb + head * stride_mh
    top = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    moment = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, VALUE_WIDTH], tl.float32)
    last = n_keys
    whole = 0
    if MASK == 0:
        whole = (n_keys // BLOCK_K) * BLOCK_K
    if CAUSAL:
        last = tl.minimum(n_keys, start + BLOCK_Q)
        whole = tl.minimum(whole, ((start + 1) // BLOCK_K) * BLOCK_K)
    acc, top, total, moment = _forward_blocks(
        acc, top, total, moment, q, k, v, mask_pair, 0, whole, rows, n_queries, n_keys, width, value_width,
        stride_kn, stride_vn, stride_mq, stride_mk, to_base2, to_tanh,
        CAUSAL, MASK, SOFTCAP, VALUE, False, PAD, PAD_VALUE, PRECISION, BLOCK_K, WIDTH, VALUE_WIDTH,
    )  # fmt: skip
    acc, top, total, moment = _forward_blocks(
        acc, top, total, moment, q, k, v, mask_pair, whole, last, rows, n_queries, n_keys, width, value_width,
        stride_kn, stride_vn, stride_mq, stride_mk, to_base2, to_tanh,
        CAUSAL, MASK, SOFTCAP, VALUE, True, PAD, PAD_VALUE, PRECISION, BLOCK_K, WIDTH, VALUE_WIDTH,
    )  # fmt: skip
    some = total > 0
    safe = tl.where(some, total, 1.0)
    log_total = tl.log2(safe)
    at = pair.to(tl.int64) * n_queries + rows
    tl.store(entropy + at, tl.maximum((log_total - moment / safe) * LN2, 0.0), mask=rows < n_queries)
    tl.store(lse + at, tl.where(some, (top + log_total) * LN2, float("-inf")), mask=rows < n_queries)
    if VALUE:
        across = tl.arange(0, VALUE_WIDTH)
        at_output = output + batch * stride_ob + head * stride_oh + offset * stride_on
        tl.store(
            at_output + inside[:, None] * stride_on + across[None, :],
            (acc / safe[:, None]).to(output.dtype.element_ty),
            mask=(rows[:, None] < n_queries) & (across[None, :] < value_width),
        )
