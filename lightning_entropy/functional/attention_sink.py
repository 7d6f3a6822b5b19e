r"""Attention sinks: heads that put their mass on one key, and what they do beside it.

A head whose queries nearly all attend to one key (the first token, a register) has an entropy near 0, as a collapsed
head has. The two differ in what is left without that key. The chain rule splits the entropy of a row at key *j*:

.. math:: H(p) = h(p_j) + (1 - p_j)\, H(p \mid \text{not } j)

with *h* the entropy of one bit. In a sink the last term's entropy is that of a working head; in a collapsed head, whose
logits are large everywhere, it is near 0 too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_entropy.functional.attention_operands import wide
from lightning_entropy.functional.entropy import entropy_from_logits


class AttentionSink(NamedTuple):
    """The most attended key of each head, and the attention beside it; each ``(..., heads)``.

    Attributes:
        mass: mean over the query rows of the probability of the most attended key.
        key: which key that is.
        rest: entropy of the rows without that key, divided by the log of their remaining keys, each row weighted by
            the mass it has there: where attention goes that does not go into the sink.
    """

    mass: Tensor
    key: Tensor
    rest: Tensor


def attention_sink(logits: Tensor, mask: Tensor | None = None) -> AttentionSink:
    r"""The key on which a head puts most of its mass, and the normalised entropy of its attention elsewhere.

    .. math:: m = \max_j \frac1n \sum_i p_{ij}, \qquad
        r = \frac{\sum_i (1 - p_{ij^*})\, H_i / \log (n_i - 1)}{\sum_i (1 - p_{ij^*})}

    where :math:`H_i` is the entropy of row *i* renormalised without the key :math:`j^*`, and :math:`n_i` its number of
    allowed keys. From logits, so that *r* is exact also where the sink takes all but 1e-30 of the mass.

    Args:
        logits: ``(..., heads, queries, keys)``; ``-inf`` marks a key that does not take part.
        mask: non-zero where a key takes part, broadcastable to ``logits``.

    Returns:
        An :class:`AttentionSink`, float32 or wider. Rows with fewer than two allowed keys are left out of ``mass``,
        with fewer than two beside the sink out of ``rest``; NaN where no row is left.

    Raises:
        ValueError: if ``logits`` has fewer than two dimensions.

    Reference:
        Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453, for the phenomenon;
        Shannon (1948), section 6, for the chain rule. The weighted rest is ours.

    Example:
        >>> logits = torch.zeros(1, 4, 5)
        >>> logits[..., 0] = 20.0
        >>> [round(float(x), 4) for x in attention_sink(logits)]
        [1.0, 0.0, 1.0]
    """
    if logits.dim() < 2:
        raise ValueError(f"logits must be (..., queries, keys), got the shape {tuple(logits.shape)}")
    s = wide(logits)
    with torch.autocast(s.device.type, enabled=False):
        if mask is not None:
            s = s.masked_fill(mask == 0, -torch.inf)
        allowed = s.detach() != -torch.inf
        several = allowed.sum(-1) > 1
        s = s.masked_fill(~several[..., None], 0.0)  # rows that do not count; all -inf would give NaN gradients
        p = torch.where(several[..., None], s.softmax(-1), 0.0)
        columns = p.sum(-2) / several.sum(-1, keepdim=True)  # 0 / 0 where no row counts: NaN, as documented
        mass, key = columns.max(-1)

        chosen = torch.arange(s.shape[-1], device=s.device) == key[..., None, None]
        others = allowed & ~chosen
        left = others.sum(-1)
        counts = left > 1
        h = entropy_from_logits(s, mask=others) / left.clamp(min=2).log()
        # the mass beside the sink as a difference of logarithms, relative to the largest: never 0 / 0
        beside = s.masked_fill(~others, torch.finfo(s.dtype).min).logsumexp(-1) - s.logsumexp(-1)
        beside = torch.where(counts, beside, -torch.inf)
        top = beside.detach().amax(-1, keepdim=True)
        weight = torch.where(counts, (beside - torch.where(top == -torch.inf, 0.0, top)).exp(), 0.0)
        rest = (weight * h).sum(-1) / weight.sum(-1)
    return AttentionSink(mass, key, rest)


__all__ = ["AttentionSink", "attention_sink"]
