r"""Entropy of attention by online softmax over blocks of keys: O(N) memory, any additive bias, soft-capped logits.

With running maximum *m*, :math:`l = \sum_j e^{s_j - m}` and :math:`e = \sum_j e^{s_j - m} (s_j - m)`, the entropy of a
row is :math:`\log l - e / l`. The backward computes each block again, with
:math:`\partial H / \partial s_j = -p_j (\log p_j + H)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_entropy.functional.attention_operands import wide

_BLOCK = 256  # keys at a time; a block of logits is (batch, heads, queries, _BLOCK)


def logits_block(
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


class BlockwiseEntropy(torch.autograd.Function):
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
        """Entropy and log-sum-exp, each ``(..., queries)``."""
        q, k = wide(query), wide(key)
        top: Tensor | None = None
        total = moment = q.new_zeros(())
        for start in range(0, k.shape[-2], _BLOCK):
            stop = min(start + _BLOCK, k.shape[-2])
            s, _ = logits_block(q, k, mask, is_causal, scale, softcap, start, stop)
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
        """Gradients of query, key and an additive mask."""
        query, key, mask, h, lse = ctx.saved_tensors
        is_causal, scale, softcap = ctx.options
        grad_h, grad_lse = grads
        q, k = wide(query), wide(key)
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        wants_bias = mask is not None and ctx.needs_input_grad[2]
        db = torch.zeros_like(mask, dtype=q.dtype) if wants_bias else None
        base = torch.where(lse > -torch.inf, lse, 0.0)[..., None]
        for start in range(0, k.shape[-2], _BLOCK):
            stop = min(start + _BLOCK, k.shape[-2])
            s, slope = logits_block(q, k, mask, is_causal, scale, softcap, start, stop)
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
