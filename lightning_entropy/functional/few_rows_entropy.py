r"""Entropy of the attention of few query rows, from their part of the map.

With as many rows as a head is wide, or fewer, that part is no larger than the keys, and the cheapest way is one matrix
product forward and two backward, which is the least there is. What backward needs is made in forward and is one tensor:

.. math:: g_j = p_j (\log p_j + H), \qquad
    dq = -c\, dH \sum_j g_j k_j, \qquad dk_j = \sum_i g_{ij} \, (-c\, dH_i \, q_i)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_entropy.functional.attention_operands import wide
from lightning_entropy.functional.entropy import entropy_from_logits


class FewRowsEntropy(torch.autograd.Function):
    """Entropy of the rows ``rows`` of the queries (None: all), with a bool mask of those rows or none."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, rows: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
        """Entropy in float32 or wider, and the tensor g for backward."""
        q = wide(query if rows is None else query.index_select(-2, rows)) * scale
        s = q @ wide(key).transpose(-2, -1)
        if mask is not None:
            s = s.masked_fill_(~mask, -torch.inf)
        p = s.softmax(-1)
        # log p from one logarithm a row, that of the largest probability: a pass over the map less than log_softmax
        log_p = s.sub_((s.amax(-1) - p.amax(-1).log())[..., None])
        if mask is not None:
            log_p, p = log_p.masked_fill_(~mask, 0.0), p.masked_fill_(~mask, 0.0)
        h = -torch.linalg.vecdot(p, log_p)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            ctx.save_for_backward(query, key, rows, mask, p.mul_(log_p.add_(h[..., None])))
            ctx.scale = scale
        return h.clamp_(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query and key."""
        query, key, rows, mask, g = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: g is a constant here, the formula is not
            return _differentiable_gradients(ctx, grad, query, key, rows, mask)
        grad = -ctx.scale * grad[..., None]
        d_query = d_key = None
        if ctx.needs_input_grad[0]:
            d_query = ((g @ wide(key)) * grad).to(query.dtype)
            if rows is not None:
                every = d_query.new_zeros(*d_query.shape[:-2], *query.shape[-2:])
                d_query = every.index_copy_(-2, rows, d_query)
            d_query = d_query.sum_to_size(query.shape)
        if ctx.needs_input_grad[1]:
            q = wide(query if rows is None else query.index_select(-2, rows))
            d_key = (g.transpose(-2, -1) @ (q * grad)).to(key.dtype).sum_to_size(key.shape)
        return d_query, d_key, None, None, None


def _differentiable_gradients(
    ctx: Any, grad: Tensor, query: Tensor, key: Tensor, rows: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, ...]:
    s = wide(query if rows is None else query.index_select(-2, rows)) * ctx.scale @ wide(key).transpose(-2, -1)
    h = entropy_from_logits(s, mask=mask)
    wanted = [x for x, needed in zip((query, key), ctx.needs_input_grad) if needed]
    found = iter(torch.autograd.grad(h, wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
