r"""The backward of attention with entropy, which computes the logits again. Importing this module imports triton.

With dO, dH and dl the gradients of output, entropy and log-sum-exp, and :math:`p_j = e^{s_j - \ell}`:

.. math:: \Delta = dO \cdot O + H\,dH - d\ell, \qquad dS_j = p_j\,(dO \cdot v_j - dH \log p_j - \Delta)

dQ is computed by tiles of queries, dK and dV by tiles of keys: nothing is added atomically, so that two runs give the
same bits, and the heads that share a key head are summed in one program.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from lightning_entropy.functional.triton.tiles import LN2, LOG2E, allowed, capped_logits, dot, load_tile


@triton.jit
def delta_kernel(
    output, d_output, entropy, d_entropy, d_lse, delta,
    stride_ob, stride_oh, stride_on, stride_db, stride_dh, stride_dn, heads, n_queries, value_width,
    OUTPUT: tl.constexpr, ENTROPY: tl.constexpr, LSE: tl.constexpr, PAD_VALUE: tl.constexpr,
    BLOCK_Q: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """What every dS of a row subtracts: dO.O + H dH - dlse, of the gradients that there are."""
    blocks = tl.cdiv(n_queries, BLOCK_Q)
    pair = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * BLOCK_Q
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    inside = tl.arange(0, BLOCK_Q)
    rows = start + inside
    offset = start.to(tl.int64)
    at = pair.to(tl.int64) * n_queries + rows
    total = tl.zeros([BLOCK_Q], tl.float32)
    if OUTPUT:
        across = tl.arange(0, VALUE_WIDTH)
        left = n_queries - start
        o = load_tile(
            output + batch * stride_ob + head * stride_oh + offset * stride_on, inside, across, left, value_width,
            stride_on, True, PAD_VALUE,
        )  # fmt: skip
        do = load_tile(
            d_output + batch * stride_db + head * stride_dh + offset * stride_dn, inside, across, left, value_width,
            stride_dn, True, PAD_VALUE,
        )  # fmt: skip
        total += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if ENTROPY:
        h = tl.load(entropy + at, mask=rows < n_queries, other=0.0)
        total += h * tl.load(d_entropy + at, mask=rows < n_queries, other=0.0)
    if LSE:
        total -= tl.load(d_lse + at, mask=rows < n_queries, other=0.0)
    tl.store(delta + at, total, mask=rows < n_queries)


@triton.jit
def _slope(ds, t, SOFTCAP: tl.constexpr):
    """Take dS through the soft-capping, with ``t`` its tanh."""
    if SOFTCAP:
        return ds * (1.0 - t * t)
    else:
        return ds


@triton.jit
def _query_gradient_blocks(
    dq, q, do, k, v, mask, lse2, gain, delta, first, last, rows, n_rows, n_keys, width, value_width,
    stride_k, stride_v, stride_mask_row, stride_mask_key, to_base2, to_tanh,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, OUTPUT: tl.constexpr, CHECK: tl.constexpr,
    PAD: tl.constexpr, PAD_VALUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    inside = tl.arange(0, BLOCK_K)
    across = tl.arange(0, WIDTH)
    across_value = tl.arange(0, VALUE_WIDTH)
    for start in range(first, last, BLOCK_K):
        offset = tl.cast(start, tl.int64)
        k_tile = load_tile(k + offset * stride_k, inside, across, n_keys - start, width, stride_k, CHECK, PAD)
        s, t = capped_logits(dot(q, tl.trans(k_tile), None, PRECISION), to_base2, to_tanh, SOFTCAP)
        log_p = s - lse2[:, None]
        if CHECK:
            ok = allowed(
                rows[:, None], (start + inside)[None, :], n_rows, n_keys, mask, stride_mask_row, stride_mask_key,
                CAUSAL, MASK,
            )  # fmt: skip
            log_p = tl.where(ok, log_p, 0.0)
            p = tl.where(ok, tl.exp2(log_p), 0.0)
        else:
            p = tl.exp2(log_p)
        inner = -gain[:, None] * log_p - delta[:, None]
        if OUTPUT:
            v_tile = load_tile(
                v + offset * stride_v, inside, across_value, n_keys - start, value_width, stride_v, CHECK, PAD_VALUE
            )
            inner = dot(do, tl.trans(v_tile), inner, PRECISION)
        ds = _slope(p * inner, t, SOFTCAP)
        dq = dot(ds.to(k_tile.dtype), k_tile, dq, PRECISION)
    return dq


@triton.jit
def query_gradient_kernel(
    query, key, value, mask, d_output, lse, d_entropy, delta, d_query,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    heads, groups, n_queries, n_keys, width, value_width, scale, to_base2, to_tanh,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, OUTPUT: tl.constexpr, ENTROPY: tl.constexpr,
    PAD: tl.constexpr, PAD_VALUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries."""
    blocks = tl.cdiv(n_queries, BLOCK_Q)
    pair = tl.program_id(0) // blocks
    tile = tl.program_id(0) % blocks
    if CAUSAL:
        tile = blocks - 1 - tile
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    start = tile * BLOCK_Q
    inside = tl.arange(0, BLOCK_Q)
    rows = start + inside
    offset = start.to(tl.int64)
    across = tl.arange(0, WIDTH)
    q = load_tile(
        query + batch * stride_qb + head * stride_qh + offset * stride_qn, inside, across,
        n_queries - start, width, stride_qn, True, PAD,
    )  # fmt: skip
    do = q
    if OUTPUT:
        do = load_tile(
            d_output + batch * stride_ob + head * stride_oh + offset * stride_on, inside, tl.arange(0, VALUE_WIDTH),
            n_queries - start, value_width, stride_on, True, PAD_VALUE,
        )  # fmt: skip
    at = pair.to(tl.int64) * n_queries + rows
    lse2 = tl.load(lse + at, mask=rows < n_queries, other=0.0) * LOG2E
    row_delta = tl.load(delta + at, mask=rows < n_queries, other=0.0)
    gain = tl.zeros([BLOCK_Q], tl.float32)
    if ENTROPY:
        gain = tl.load(d_entropy + at, mask=rows < n_queries, other=0.0) * LN2
    k = key + batch * stride_kb + (head // groups) * stride_kh
    v = value + batch * stride_vb + (head // groups) * stride_vh
    mask_pair = mask + batch * stride_mb + head * stride_mh
    dq = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    last = n_keys
    whole = 0
    if MASK == 0:
        whole = (n_keys // BLOCK_K) * BLOCK_K
    if CAUSAL:
        last = tl.minimum(n_keys, start + BLOCK_Q)
        whole = tl.minimum(whole, ((start + 1) // BLOCK_K) * BLOCK_K)
    dq = _query_gradient_blocks(
        dq, q, do, k, v, mask_pair, lse2, gain, row_delta, 0, whole, rows, n_queries, n_keys, width, value_width,
        stride_kn, stride_vn, stride_mq, stride_mk, to_base2, to_tanh,
        CAUSAL, MASK, SOFTCAP, OUTPUT, False, PAD, PAD_VALUE, PRECISION, BLOCK_K, WIDTH, VALUE_WIDTH,
    )  # fmt: skip
    dq = _query_gradient_blocks(
        dq, q, do, k, v, mask_pair, lse2, gain, row_delta, whole, last, rows, n_queries, n_keys, width, value_width,
        stride_kn, stride_vn, stride_mq, stride_mk, to_base2, to_tanh,
        CAUSAL, MASK, SOFTCAP, OUTPUT, True, PAD, PAD_VALUE, PRECISION, BLOCK_K, WIDTH, VALUE_WIDTH,
    )  # fmt: skip
    at_gradient = d_query + batch * stride_gb + head * stride_gh + offset * stride_gn
    tl.store(
        at_gradient + inside[:, None] * stride_gn + across[None, :],
        (dq * scale).to(d_query.dtype.element_ty),
        mask=(rows[:, None] < n_queries) & (across[None, :] < width),
    )


@triton.jit
def _key_gradient_blocks(
    dk, dv, k_tile, v_tile, q, do, mask, lse, d_entropy, delta, first, last, columns, n_rows, n_keys, width,
    value_width, stride_q, stride_o, stride_mask_row, stride_mask_key, to_base2, to_tanh,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, OUTPUT: tl.constexpr, ENTROPY: tl.constexpr,
    CHECK: tl.constexpr, PAD: tl.constexpr, PAD_VALUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Add what the query blocks from ``first`` to ``last`` give; tiles are keys x queries.

    Queries beyond the last need no mask: their dO, dH and Delta are 0.
    """
    inside = tl.arange(0, BLOCK_Q)
    across = tl.arange(0, WIDTH)
    across_value = tl.arange(0, VALUE_WIDTH)
    for start in range(first, last, BLOCK_Q):
        offset = tl.cast(start, tl.int64)
        rows = start + inside
        q_tile = load_tile(q + offset * stride_q, inside, across, n_rows - start, width, stride_q, True, PAD)
        s, t = capped_logits(dot(k_tile, tl.trans(q_tile), None, PRECISION), to_base2, to_tanh, SOFTCAP)
        lse2 = tl.load(lse + rows, mask=rows < n_rows, other=0.0) * LOG2E
        log_p = s - lse2[None, :]
        if CHECK:
            ok = allowed(
                rows[None, :], columns[:, None], n_rows, n_keys, mask, stride_mask_row, stride_mask_key, CAUSAL, MASK
            )
            log_p = tl.where(ok, log_p, 0.0)
            p = tl.where(ok, tl.exp2(log_p), 0.0)
        else:
            p = tl.exp2(log_p)
        inner = tl.zeros_like(log_p) - tl.load(delta + rows, mask=rows < n_rows, other=0.0)[None, :]
        if ENTROPY:
            gain = tl.load(d_entropy + rows, mask=rows < n_rows, other=0.0) * LN2
            inner -= gain[None, :] * log_p
        if OUTPUT:
            do_tile = load_tile(
                do + offset * stride_o, inside, across_value, n_rows - start, value_width, stride_o, True, PAD_VALUE
            )
            dv = dot(p.to(do_tile.dtype), do_tile, dv, PRECISION)
            inner = dot(v_tile, tl.trans(do_tile), inner, PRECISION)
        ds = _slope(p * inner, t, SOFTCAP)
        dk = dot(ds.to(q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv


@triton.jit
def key_gradient_kernel(
    query, key, value, mask, d_output, lse, d_entropy, delta, d_key, d_value,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ob, stride_oh, stride_on,
    stride_gb, stride_gh, stride_gn, stride_wb, stride_wh, stride_wn,
    key_heads, groups, n_queries, n_keys, width, value_width, scale, to_base2, to_tanh,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, OUTPUT: tl.constexpr, ENTROPY: tl.constexpr,
    PAD: tl.constexpr, PAD_VALUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, over all query heads that they serve."""
    blocks = tl.cdiv(n_keys, BLOCK_K)
    pair = tl.program_id(0) // blocks
    batch = (pair // key_heads).to(tl.int64)
    key_head = (pair % key_heads).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK_K
    inside = tl.arange(0, BLOCK_K)
    columns = start + inside
    offset = start.to(tl.int64)
    across = tl.arange(0, WIDTH)
    across_value = tl.arange(0, VALUE_WIDTH)
    k_tile = load_tile(
        key + batch * stride_kb + key_head * stride_kh + offset * stride_kn, inside, across,
        n_keys - start, width, stride_kn, True, PAD,
    )  # fmt: skip
    v_tile = k_tile
    if OUTPUT:
        v_tile = load_tile(
            value + batch * stride_vb + key_head * stride_vh + offset * stride_vn, inside, across_value,
            n_keys - start, value_width, stride_vn, True, PAD_VALUE,
        )  # fmt: skip
    dk = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_K, VALUE_WIDTH], tl.float32)
    first = 0
    whole = 0  # from here on every entry takes part
    if CAUSAL:
        first = (start // BLOCK_Q) * BLOCK_Q
        whole = tl.cdiv(start + BLOCK_K - 1, BLOCK_Q) * BLOCK_Q
    # a last tile that is not full looks at every entry, and so does one with a mask
    everything = (MASK != 0) | (start + BLOCK_K > n_keys)
    checked = tl.where(everything, n_queries, whole)
    whole = tl.where(everything, n_queries, whole)
    for member in range(groups):
        head = key_head * groups + member
        row = (batch * key_heads * groups + head) * n_queries
        q = query + batch * stride_qb + head * stride_qh
        do = d_output + batch * stride_ob + head * stride_oh
        mask_pair = mask + batch * stride_mb + head * stride_mh
        dk, dv = _key_gradient_blocks(
            dk, dv, k_tile, v_tile, q, do, mask_pair, lse + row, d_entropy + row, delta + row,
            first, tl.minimum(checked, n_queries), columns, n_queries, n_keys, width, value_width,
            stride_qn, stride_on, stride_mq, stride_mk, to_base2, to_tanh,
            CAUSAL, MASK, SOFTCAP, OUTPUT, ENTROPY, True, PAD, PAD_VALUE, PRECISION, BLOCK_Q, WIDTH, VALUE_WIDTH,
        )  # fmt: skip
        dk, dv = _key_gradient_blocks(
            dk, dv, k_tile, v_tile, q, do, mask_pair, lse + row, d_entropy + row, delta + row,
            whole, n_queries, columns, n_queries, n_keys, width, value_width,
            stride_qn, stride_on, stride_mq, stride_mk, to_base2, to_tanh,
            CAUSAL, MASK, SOFTCAP, OUTPUT, ENTROPY, False, PAD, PAD_VALUE, PRECISION, BLOCK_Q, WIDTH, VALUE_WIDTH,
        )  # fmt: skip
    stored = columns[:, None] < n_keys
    tl.store(
        d_key + batch * stride_gb + key_head * stride_gh + offset * stride_gn
        + inside[:, None] * stride_gn + across[None, :],
        (dk * scale).to(d_key.dtype.element_ty),
        mask=stored & (across[None, :] < width),
    )  # fmt: skip
    if OUTPUT:
        tl.store(
            d_value + batch * stride_wb + key_head * stride_wh + offset * stride_wn
            + inside[:, None] * stride_wn + across_value[None, :],
            dv.to(d_value.dtype.element_ty),
            mask=stored & (across_value[None, :] < value_width),
        )  # fmt: skip
