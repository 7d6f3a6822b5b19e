"""Losses on attention distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_entropy.functional.entropy import entropy_from_logits, top_k_entropy_from_logits


def aem_loss(
    logits: Tensor,
    dim: int = -1,
    mask: Tensor | None = None,
    top_k: int | None = None,
    normalize: bool = False,
    target: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Attention entropy maximization: the negative entropy of attention over the instances of a bag, in nats.

    .. math:: L = \frac{1}{R} \sum_{r=1}^{R} \sum_{n=1}^{N} a_{rn} \log a_{rn}, \qquad a_r = \mathrm{softmax}(s_r)

    where a row *r* is one distribution: a head, branch or class row of a bag. Added to the loss with a positive
    weight it flattens attention. It is **not** divided by :math:`\log N` unless ``normalize=True``, so its size
    depends on the number of instances: :math:`L \in [-\log N, 0]`.

    Args:
        logits: attention logits, any shape, for example ``(bags, branches, instances)``.
        dim: the dimension of the instances.
        mask: non-zero where an instance exists, broadcastable to ``logits``.
        top_k: the entropy of the softmax over the ``top_k`` largest logits of each row instead of all.
        normalize: divide each row's entropy by the log of its number of instances (of kept ones with ``top_k``).
        target: stop pushing a row whose normalised entropy has reached this value (between 0 and 1): the row
            contributes :math:`\max(0, \tau - H/\log N)^2` instead of :math:`-H`.
        reduction: ``"mean"`` over all rows, ``"sum"`` over all rows, or ``"none"``. Rows without any instance, or
            with one, give 0; rows without any are left out of the mean.

    Returns:
        A scalar, or the shape of ``logits`` without ``dim`` for ``reduction="none"``; float32 or wider.

    Raises:
        ValueError: if an argument is out of range or ``mask`` cannot be broadcast.

    Reference:
        Attention Entropy Maximization for Multiple Instance Learning, arXiv 2406.15303, equation of the AEM loss;
        ``top_k`` is in the authors' public code only, ``target`` is ours.

    Example:
        >>> aem_loss(torch.zeros(1, 4))
        tensor(-1.3863)
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if target is not None and not 0 < target <= 1:
        raise ValueError(f"target must be a normalised entropy in (0, 1], got {target}")
    relative = normalize or target is not None
    if top_k is None:
        h = entropy_from_logits(logits, dim, mask, normalize=relative)
    else:
        h = top_k_entropy_from_logits(logits, top_k, dim, mask, normalize=relative)
    loss = -h if target is None else (target - h).clamp(min=0).square()
    exists = logits.detach() != -torch.inf
    if mask is not None:
        exists = exists & (mask != 0)
    count = exists.sum(dim)
    # One instance has nothing to spread over: 0, although its normalised entropy is 1 by definition.
    loss = torch.where(count > 1, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (count > 0).sum().clamp(min=1)
