r"""Entropy of scaled dot-product attention without its map.

For a query row with logits :math:`s_j = c\, q \cdot k_j`, probabilities *p* and :math:`\ell = \log \sum_j e^{s_j}`:

.. math:: H = \ell - \sum_j p_j s_j, \qquad \partial H / \partial s_j = -p_j (\log p_j + H)

Three ways to compute it, which agree:

- ``two_call``: :math:`\sum_j p_j s_j = c\, q \cdot \sum_j p_j k_j` is an attention output with the keys as values. With
  ``pk = sdpa(q, k, k.detach())`` the number ``lse.detach() - c * (q.detach() * pk).sum(-1)`` has the exact value *and*
  the exact gradient, since what is detached cancels. It holds where the logits are bilinear in query and key.
- ``blockwise``: online softmax over blocks of keys with a backward that recomputes them; O(N) memory, for additive
  biases and soft-capped logits too.
- ``dense``: the map itself, N x N; the definition, for tests and small N.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_entropy.functional.entropy import entropy_from_logits

BACKENDS = ("auto", "two_call", "blockwise", "dense")
_BLOCK = 256  # keys at a time; a block of logits is (batch, heads, queries, _BLOCK)


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
        backend: ``"two_call"``, ``"blockwise"``, ``"dense"``, or ``"auto"``: two calls where the logits are bilinear
            (no bias, no soft-capping), blocks otherwise.
        return_lse: return the log-sum-exp too. It is differentiable with ``blockwise`` and ``dense``.

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
    bilinear = logit_softcap is None and (attn_mask is None or attn_mask.dtype == torch.bool)
    if backend == "two_call" and not bilinear:
        raise ValueError("two_call needs logits that are bilinear in query and key: no additive mask, no softcap")
    chosen = ("two_call" if bilinear else "blockwise") if backend == "auto" else backend
    rows = None
    if queries is not None:
        if not 1 <= queries <= query.shape[-2]:
            raise ValueError(f"queries must be between 1 and {query.shape[-2]} query rows, got {queries}")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        rows = torch.randperm(query.shape[-2], generator=generator)[:queries].sort().values.to(query.device)
        query = query.index_select(-2, rows)
        if attn_mask is not None and attn_mask.dim() > 1 and attn_mask.shape[-2] > 1:
            attn_mask = attn_mask.index_select(-2, rows)
        if is_causal:
            attn_mask = torch.arange(key.shape[-2], device=query.device) <= rows[:, None]
            is_causal = False
    c = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        if enable_gqa:
            if query.shape[-3] % key.shape[-3]:
                raise ValueError(f"{query.shape[-3]} query heads cannot share {key.shape[-3]} key heads")
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        if chosen == "two_call":
            h, lse = _two_call(query, key, attn_mask, is_causal, c)
        elif chosen == "blockwise":
            h, lse = _Blockwise.apply(query, key, attn_mask, is_causal, c, logit_softcap)
        else:
            s = _logits(_wide(query), _wide(key), attn_mask, is_causal, c, logit_softcap, 0, key.shape[-2])[0]
            h, lse = entropy_from_logits(s), s.logsumexp(-1)
    return AttentionEntropy(h, lse) if return_lse else h


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


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _two_call(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One more attention call, with the keys as values. Entropy does not change when all keys move by one vector, and
    keys with mean 0 keep log-sum-exp and mean logit small, so that their difference loses fewer digits.
    """
    centred = key - key.detach().mean(-2, keepdim=True)
    pk, lse = _flash_with_lse(query, centred, mask, is_causal, scale)
    allowed = lse > -torch.inf
    mean_logit = scale * (_wide(query.detach()) * torch.where(allowed[..., None], _wide(pk), 0.0)).sum(-1)
    return torch.where(allowed, (lse - mean_logit).clamp(min=0), 0.0), lse


def _flash_with_lse(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention with the (constant) keys as values, and the log-sum-exp, from one call where a kernel gives both."""
    values = key.detach()
    float_mask = None
    if mask is not None:
        float_mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -torch.inf)
    if query.device.type == "cpu" and query.dim() == 4:
        pk, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, values, 0.0, is_causal, attn_mask=float_mask, scale=scale
        )
        return pk, _wide(lse)
    with torch.no_grad():
        lse = _Blockwise.apply(query.detach(), values, mask, is_causal, scale, None)[1]
    pk = F.scaled_dot_product_attention(query, key, values, attn_mask=mask, is_causal=is_causal, scale=scale)
    return pk, lse


def _logits(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor | None]:
    """Logits of one block of keys, and the derivative of the soft-capping."""
    s = q @ k[..., start:stop, :].transpose(-2, -1) * scale
    slope = None
    if softcap is not None:
        t = (s / softcap).tanh()
        s, slope = t * softcap, 1 - t * t
    if is_causal:
        rows = torch.arange(q.shape[-2], device=q.device)[:, None]
        columns = torch.arange(start, stop, device=q.device)
        s = s.masked_fill(columns > rows, -torch.inf)
    if mask is not None:
        part = mask if mask.shape[-1] == 1 else mask[..., start:stop]
        s = s.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else s + part
    return s, slope


class _Blockwise(torch.autograd.Function):
    """Entropy and log-sum-exp by online softmax; saves no map and computes the blocks again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        q, k = _wide(query), _wide(key)
        top: Tensor | None = None
        total = moment = q.new_zeros(())
        for start in range(0, k.shape[-2], _BLOCK):
            stop = min(start + _BLOCK, k.shape[-2])
            s, _ = _logits(q, k, mask, is_causal, scale, softcap, start, stop)
            new = s.amax(-1)
            new = new if top is None else torch.maximum(top, new)
            base = torch.where(new > -torch.inf, new, 0.0)
            z = s - base[..., None]
            p = z.exp()
            z = torch.where(p > 0, z, 0.0)
            block_total, block_moment = p.sum(-1), (p * z).sum(-1)
            if top is None:
                total, moment = block_total, block_moment
            else:
                step = torch.where(top > -torch.inf, top - base, 0.0)
                decay = torch.where(top > -torch.inf, step.exp(), 0.0)
                moment = decay * (moment + step * total) + block_moment
                total = decay * total + block_total
            top = new
        if top is None:
            raise ValueError("attention needs at least one key, got none")
        allowed = total > 0
        safe = torch.where(allowed, total, 1.0)
        h = (safe.log() - moment / safe).clamp(min=0)
        lse = torch.where(allowed, top + safe.log(), -torch.inf)
        ctx.save_for_backward(query, key, mask, h, lse)
        ctx.options = (is_causal, scale, softcap)
        return h, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, mask, h, lse = ctx.saved_tensors
        is_causal, scale, softcap = ctx.options
        grad_h, grad_lse = grads
        q, k = _wide(query), _wide(key)
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        wants_bias = mask is not None and ctx.needs_input_grad[2]
        db = torch.zeros_like(mask, dtype=q.dtype) if wants_bias else None
        base = torch.where(lse > -torch.inf, lse, 0.0)[..., None]
        for start in range(0, k.shape[-2], _BLOCK):
            stop = min(start + _BLOCK, k.shape[-2])
            s, slope = _logits(q, k, mask, is_causal, scale, softcap, start, stop)
            log_p = torch.where(s > -torch.inf, s - base, 0.0)
            p = torch.where(s > -torch.inf, log_p.exp(), 0.0)
            ds = torch.zeros_like(p)
            if grad_h is not None:
                ds -= grad_h[..., None] * p * (log_p + h[..., None])
            if grad_lse is not None:
                ds += grad_lse[..., None] * p
            if db is not None:
                _add_summed(db, ds, start, stop)
            if slope is not None:
                ds = ds * slope
            dq += scale * (ds @ k[..., start:stop, :])
            dk[..., start:stop, :] += (scale * (ds.transpose(-2, -1) @ q)).sum_to_size(dk[..., start:stop, :].shape)
        return dq.to(query.dtype), dk.to(key.dtype), None if db is None else db.to(mask.dtype), None, None, None


def _add_summed(total: Tensor, block: Tensor, start: int, stop: int) -> None:
    """Add a block's gradient to that of a bias which was broadcast."""
    target = total if total.shape[-1] == 1 else total[..., start:stop]
    target += block.sum_to_size(target.shape)
