r"""Entropy of scaled dot-product attention without its map.

For a query row with logits :math:`s_j = c\, q \cdot k_j`, probabilities *p* and :math:`\ell = \log \sum_j e^{s_j}`:

.. math:: H = \ell - \sum_j p_j s_j, \qquad \partial H / \partial s_j = -p_j (\log p_j + H)

Five ways to compute it, which agree:

- ``two_call``: :math:`\sum_j p_j s_j = c\, q \cdot \sum_j p_j k_j` is an attention output with the keys as values. With
  ``pk = sdpa(q, k, k.detach())`` the number ``lse.detach() - c * (q.detach() * pk).sum(-1)`` has the exact value *and*
  the exact gradient, since what is detached cancels. It holds where the logits are bilinear in query and key.
- ``triton``: a fused kernel on a GPU that reads no values; soft-capped logits too, no additive bias
  (:mod:`lightning_entropy.functional.triton` has the one that returns the attention output in the same pass).
- ``blockwise``: online softmax over blocks of keys with a backward that recomputes them; O(N) memory, for additive
  biases and soft-capped logits too.
- ``few_rows``: the map of these rows, saved once; the cheapest where there are no more of them than a head is wide.
- ``dense``: the map itself, N x N; the definition, for tests and small N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_entropy.functional import triton as triton_kernels
from lightning_entropy.functional.attention_operands import for_query_heads, wide
from lightning_entropy.functional.blockwise_entropy import BlockwiseEntropy, logits_block
from lightning_entropy.functional.entropy import entropy_from_logits
from lightning_entropy.functional.few_rows_entropy import FewRowsEntropy
from lightning_entropy.functional.two_call_entropy import two_call_entropy

BACKENDS = ("auto", "two_call", "triton", "blockwise", "few_rows", "dense")


class AttentionEntropy(NamedTuple):
    """Entropy of each query's attention in nats, and the log-sum-exp of its logits (``-inf`` without a key)."""

    entropy: Tensor
    lse: Tensor


def attention_entropy(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    logit_softcap: float | None = None,
    queries: int | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | AttentionEntropy:
    r"""Entropy of the attention that ``scaled_dot_product_attention`` would compute, in nats, with its gradient.

    .. math:: H_i = -\sum_j p_{ij} \log p_{ij}, \qquad p_i = \mathrm{softmax}_j(c\, q_i \cdot k_j + b_{ij})

    Before dropout. No map of queries x keys is formed except by ``backend="dense"``.

    Args:
        query: ``(..., heads, queries, width)``.
        key: ``(..., heads, keys, width)``; fewer heads with ``enable_gqa``.
        attn_mask: bool (True takes part) or additive, broadcastable to ``(..., heads, queries, keys)``.
        is_causal: query i sees keys 0 to i.
        scale: c; default ``1 / sqrt(width)``.
        enable_gqa: each key head serves several query heads.
        logit_softcap: t, for logits ``t * tanh(c q.k / t)``.
        queries: compute this many query rows only, drawn without replacement, the same for every head. Their mean is an
            unbiased estimate of the mean over all rows; :func:`sampled_mean` gives it with its standard error.
        generator: of the draw of ``queries``; None takes one seeded with 0, so that no global random state is used.
        backend: one of the five by name, or ``"auto"``: the kernel on a GPU that has it; else, where the logits are
            bilinear (no bias, no soft-capping), ``few_rows`` for up to as many rows as a head is wide and two calls for
            more; else blocks.
        return_lse: return the log-sum-exp too. It is differentiable with ``triton``, ``blockwise`` and ``dense``;
            ``few_rows`` does not have it.

    Returns:
        ``(..., heads, queries)`` in float32 or wider, in the order of the rows; 0 for a query without any
        allowed key. With ``return_lse`` an :class:`AttentionEntropy`.

    Raises:
        ValueError: if shapes do not fit, or the backend cannot compute what is asked.

    Reference:
        The identity is the mean logit's; that the log-sum-exp needs no gradient is derived in this module's docstring.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 8)
        >>> attention_entropy(q, k)
        tensor([[[1.3863, 1.3863, 1.3863, 1.3863]]])
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same width, got {query.shape[-1]} and {key.shape[-1]}")
    if logit_softcap is not None and logit_softcap <= 0:
        raise ValueError(f"logit_softcap must be positive, got {logit_softcap}")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask exclude each other, as in scaled_dot_product_attention")
    if backend in ("two_call", "few_rows") and not _bilinear(attn_mask, logit_softcap):
        raise ValueError(f"{backend} needs logits that are bilinear in query and key: no additive mask, no softcap")
    if backend == "few_rows" and return_lse:
        raise ValueError('few_rows has no log-sum-exp to return: use backend="two_call", "blockwise" or "dense"')
    if enable_gqa and query.shape[-3] % key.shape[-3]:
        raise ValueError(f"{query.shape[-3]} query heads cannot share {key.shape[-3]} key heads")
    rows = None
    if queries is not None:
        if not 1 <= queries <= query.shape[-2]:
            raise ValueError(f"queries must be between 1 and {query.shape[-2]} query rows, got {queries}")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        rows = torch.randperm(query.shape[-2], generator=generator)[:queries].sort().values.to(query.device)
        if attn_mask is not None and attn_mask.dim() > 1 and attn_mask.shape[-2] > 1:
            attn_mask = attn_mask.index_select(-2, rows)
        if is_causal:
            attn_mask = torch.arange(key.shape[-2], device=query.device) <= rows[:, None]
            is_causal = False
    if backend == "auto":
        backend = _fastest(query, key, attn_mask, logit_softcap, queries, return_lse)
    c = query.shape[-1] ** -0.5 if scale is None else scale
    h: Tensor
    lse: Tensor | None = None
    with torch.autocast(query.device.type, enabled=False):
        if rows is not None and backend != "few_rows":
            query = query.index_select(-2, rows)
        if backend == "triton":
            h, lse = triton_kernels.entropy_and_lse(
                query,
                key,
                attn_mask=attn_mask,
                is_causal=is_causal,
                scale=c,
                enable_gqa=enable_gqa,
                logit_softcap=logit_softcap,
            )
            return AttentionEntropy(h, lse) if return_lse else h
        if enable_gqa:
            key = for_query_heads(key, query.shape[-3])
        if backend == "few_rows":
            if is_causal:
                attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
            h = FewRowsEntropy.apply(query, key, rows, attn_mask, c)
        elif backend == "two_call":
            h, lse = two_call_entropy(query, key, attn_mask, is_causal, c, with_lse=return_lse)
        elif backend == "blockwise":
            h, lse = BlockwiseEntropy.apply(query, key, attn_mask, is_causal, c, logit_softcap)
        else:
            s = logits_block(wide(query), wide(key), attn_mask, is_causal, c, logit_softcap, 0, key.shape[-2])[0]
            h, lse = entropy_from_logits(s), s.logsumexp(-1)
    if not return_lse:
        return h
    assert lse is not None  # refused above where there is none
    return AttentionEntropy(h, lse)


def _bilinear(attn_mask: Tensor | None, logit_softcap: float | None) -> bool:
    return logit_softcap is None and (attn_mask is None or attn_mask.dtype == torch.bool)


def _fastest(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    logit_softcap: float | None,
    queries: int | None,
    return_lse: bool,
) -> str:
    """The backend that ``auto`` stands for."""
    kernel = query.device.type == "cuda" and triton_kernels.available()
    if kernel and triton_kernels.refusal(query, key, attn_mask=attn_mask) is None:
        return "triton"
    if not _bilinear(attn_mask, logit_softcap):
        return "blockwise"
    rows = query.shape[-2] if queries is None else queries
    # then the map of these rows is no larger than the keys
    return "few_rows" if rows <= query.shape[-1] and not return_lse else "two_call"


def sampled_mean(entropy: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    r"""Mean over all query rows, estimated from a sample without replacement, and its standard error.

    .. math:: \bar H = \frac1n \sum_i H_i, \qquad \mathrm{SE} = \sqrt{\frac{s^2}{n} \left(1 - \frac{n}{N}\right)}

    Args:
        entropy: ``(..., n)`` from :func:`attention_entropy` with ``queries=n``.
        rows: N, the number of query rows that were sampled from.

    Returns:
        Mean and standard error, each ``(...)``; the error is 0 for a whole sample and NaN for a single row.

    Raises:
        ValueError: if the sample is larger than ``rows``.

    Reference:
        Cochran, Sampling Techniques, theorem 2.2.
    """
    n = entropy.shape[-1]
    if n > rows:
        raise ValueError(f"a sample of {n} rows cannot come from {rows}")
    variance = entropy.detach().var(-1) if n > 1 else torch.full_like(entropy[..., 0].detach(), torch.nan)
    return entropy.mean(-1), (variance / n * (1 - n / rows)).clamp(min=0).sqrt()
