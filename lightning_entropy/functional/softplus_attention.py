r"""Softplus attention with length scaling and re-weighting: LSSA and LSSAR (arXiv 2501.13428).

A query that may attend to N keys of width d, with query and key scaled to length 1:

    S_j = log(d) log(N) q . k_j,    A = softplus(S) / sum softplus(S)                                  LSSA
    B = relu(N A - O)^p / sum relu(N A - O)^p,    O = 1, and 0 in the first rows                       LSSAR

As written, the power overflows float16 and underflows to rows of zeros in float32; here each row is divided by its
largest entry before the power, which cancels in the normalisation, and a row that no key exceeds (uniform attention)
keeps A. Both form the map of queries x keys: LSSAR needs the whole row twice, so no single-pass kernel computes it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_entropy.functional.attention_operands import for_query_heads, masked_out, wide

# softplus(-80) is the smallest that float32 holds as a normal number with room for the sum of a row.
_LOWEST = -80.0
# N A of uniform attention is 1 up to this many machine epsilons; the power would amplify what is rounding.
_ROUNDING = 16


class _Rows(NamedTuple):
    """Which keys each query may attend to (None: all), what is added to its logits, and how many keys those are."""

    allowed: Tensor | None
    bias: Tensor | None
    allowed_keys: Tensor


def lssa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Length-scaled softplus attention (LSSA); the signature of ``scaled_dot_product_attention``.

    .. math:: A_{ij} = \frac{\mathrm{softplus}(S_{ij})}{\sum_j \mathrm{softplus}(S_{ij})}, \qquad
        S_{ij} = \log d \, \log N_i \, \frac{q_i \cdot k_j}{|q_i| |k_j|}

    N_i is the number of keys that query i may attend to: i in causal attention, all that a cache holds for a query that
    continues it, those that are not padding under a mask.

    Args:
        query: ``(..., heads, queries, width)``.
        key: ``(..., heads, keys, width)``; fewer heads with ``enable_gqa``.
        value: ``(..., heads, keys, values)``.
        attn_mask: bool (True takes part) or additive, broadcastable to ``(..., heads, queries, keys)``. Where it adds
            less than -1e8 a key is left out; other values are added to S.
        dropout_p: share of the weights that are zeroed; applied whenever it is not 0, as in torch.
        is_causal: query i sees keys 0 to i.
        scale: the factor in place of log d.
        enable_gqa: each key head serves several query heads.

    Returns:
        ``(..., heads, queries, values)`` in the dtype of ``query``, computed in float32 or wider; 0 for a query that
        may attend to no key.

    Raises:
        ValueError: if shapes do not fit, or a mask is given together with ``is_causal``.

    Reference:
        Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models, arXiv 2501.13428.

    Example:
        >>> q = k = torch.randn(1, 2, 5, 8)
        >>> lssa_attention(q, k, torch.ones(1, 2, 5, 3), is_causal=True).mean()
        tensor(1.)
    """
    with torch.autocast(query.device.type, enabled=False):
        weights, _ = _lssa(query, key, attn_mask, is_causal, scale, enable_gqa)
        return _mix(weights, value, dropout_p, enable_gqa).to(query.dtype)


def lssar_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    power: float = 15.0,
    offset_rows: int = 3,
) -> Tensor:
    r"""Softplus attention with re-weighting (LSSAR): what exceeds uniform attention, raised to a power.

    .. math:: B_{ij} = \frac{\mathrm{relu}(N_i A_{ij} - O_i)^p}{\sum_j \mathrm{relu}(N_i A_{ij} - O_i)^p}

    with A of :func:`lssa_attention`. O_i is 1, and 0 for queries that may attend to at most ``offset_rows`` keys: in
    causal attention the first rows. Where no key exceeds O_i (uniform attention) B_i = A_i.

    Args:
        query: as in :func:`lssa_attention`, and so are the arguments that follow.
        key: see there.
        value: see there.
        attn_mask: see there.
        dropout_p: see there.
        is_causal: see there.
        scale: see there.
        enable_gqa: see there.
        power: p; the paper takes 15 for lengths beyond training and finds 3 best at the training length.
        offset_rows: rows of at most this many keys keep every key.

    Returns:
        As :func:`lssa_attention`.

    Raises:
        ValueError: as there; or if ``power`` is below 1 or ``offset_rows`` negative.

    Reference:
        arXiv 2501.13428; the stable form and the fall-back are ours.

    Example:
        >>> q = k = torch.randn(1, 2, 5, 8)
        >>> lssar_attention(q, k, torch.ones(1, 2, 5, 3), power=3).mean()
        tensor(1.)
    """
    if not (math.isfinite(power) and power >= 1):
        raise ValueError(f"power must be finite and at least 1, got {power}")
    if offset_rows < 0:
        raise ValueError(f"offset_rows must not be negative, got {offset_rows}")
    with torch.autocast(query.device.type, enabled=False):
        weights, count = _lssa(query, key, attn_mask, is_causal, scale, enable_gqa)
        count = count[..., None]
        excess = F.relu(weights * count - (count > offset_rows).to(weights.dtype))
        largest = excess.detach().amax(-1, keepdim=True)
        exceeds = largest > _ROUNDING * torch.finfo(weights.dtype).eps
        # The largest entry cancels in the normalisation, so it needs no gradient.
        raised = (excess / torch.where(exceeds, largest, 1.0)) ** power
        total = raised.sum(-1, keepdim=True)
        weights = torch.where(exceeds, raised / torch.where(exceeds, total, 1.0), weights)
        return _mix(weights, value, dropout_p, enable_gqa).to(query.dtype)


def length_scaled_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    base_length: int | None = None,
    cosine: bool = False,
) -> Tensor:
    r"""Softmax attention whose temperature follows the number of keys: the length scale of LSSA alone.

    .. math:: P_i = \mathrm{softmax}_j\!\left(c \, \frac{\log N_i}{\log N_0} \, q_i \cdot k_j + b_{ij}\right)

    It runs on the fused kernel of ``scaled_dot_product_attention``, without a map.

    Args:
        query: as in :func:`lssa_attention`, and so are the arguments that follow.
        key: see there.
        value: see there.
        attn_mask: see there; a bias is not scaled.
        dropout_p: see there.
        is_causal: see there.
        scale: c; default ``1 / sqrt(width)``, with ``cosine`` log(width).
        enable_gqa: see there.
        base_length: N_0, the number of keys at which nothing changes; None leaves the division out.
        cosine: scale queries and keys to length 1, as LSSA does.

    Returns:
        As :func:`lssa_attention`.

    Raises:
        ValueError: if shapes do not fit, a mask is given together with ``is_causal``, or ``base_length`` is below 2.

    Reference:
        arXiv 2501.13428, section on the dynamic length scale.

    Example:
        >>> q = k = torch.randn(1, 2, 5, 8)
        >>> plain = F.scaled_dot_product_attention(q, k, k)
        >>> torch.equal(length_scaled_softmax(q, k, k, base_length=5), plain)
        True
    """
    if base_length is not None and base_length < 2:
        raise ValueError(f"base_length must be at least 2 keys, got {base_length}")
    count = _rows(query, key, attn_mask, is_causal).allowed_keys
    width = query.shape[-1]
    if scale is None:
        scale = math.log(width) if cosine else width**-0.5
    with torch.autocast(query.device.type, enabled=False):
        q = _direction(query) if cosine else wide(query)
        k = _direction(key).to(query.dtype) if cosine else key
        factor = count.clamp(min=1).log()
        if base_length is not None:  # exactly 1 where nothing changes
            factor = torch.where(count == base_length, 1.0, factor / math.log(base_length))
        q = (q * factor[..., None]).to(query.dtype)
    return F.scaled_dot_product_attention(
        q, k, value, attn_mask, dropout_p, is_causal, scale=scale, **({"enable_gqa": True} if enable_gqa else {})
    )


def _direction(x: Tensor) -> Tensor:
    """The vectors at length 1, float32 or wider; a zero vector stays, with a gradient of ordinary size."""
    x = wide(x)
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)  # squares neither overflow nor underflow
    length = torch.where(largest > 0, (x * x).sum(-1, keepdim=True), 1.0).sqrt()
    return x / length


def _rows(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> _Rows:
    queries, keys = query.shape[-2], key.shape[-2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same width, got {query.shape[-1]} and {key.shape[-1]}")
    if is_causal:
        if attn_mask is not None:
            raise ValueError("is_causal and attn_mask exclude each other, as in scaled_dot_product_attention")
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        count = torch.arange(1, queries + 1, device=query.device, dtype=dtype).clamp(max=keys)
        return _Rows(allowed, None, count)
    if attn_mask is None:
        return _Rows(None, None, torch.full((1,), keys, device=query.device, dtype=dtype))
    bias: Tensor | None = None
    allowed = attn_mask
    if attn_mask.dtype != torch.bool:
        allowed = ~masked_out(attn_mask.detach())
        bias = torch.where(allowed, attn_mask, 0.0)
    allowed = torch.atleast_2d(allowed)
    allowed = allowed.expand(*allowed.shape[:-1], keys)
    return _Rows(allowed, bias, allowed.sum(-1).to(dtype))


def _lssa(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    """The weights of LSSA and the number of allowed keys of each row."""
    allowed, bias, count = _rows(query, key, attn_mask, is_causal)
    q, k = _direction(query), _direction(key)
    if enable_gqa:
        k = for_query_heads(k, q.shape[-3])
    c = math.log(query.shape[-1]) if scale is None else scale
    s = (q * (c * count.clamp(min=1).log())[..., None]) @ k.transpose(-2, -1)
    if bias is not None:
        s = (s + bias).clamp(min=_LOWEST)
    weights = F.softplus(s)
    if allowed is not None:
        weights = torch.where(allowed, weights, 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0), count


def _mix(weights: Tensor, value: Tensor, dropout_p: float, enable_gqa: bool) -> Tensor:
    weights = F.dropout(weights, dropout_p) if dropout_p else weights
    v = value.to(weights.dtype)
    return weights @ (for_query_heads(v, weights.shape[-3]) if enable_gqa else v)


__all__ = ["length_scaled_softmax", "lssa_attention", "lssar_attention"]
