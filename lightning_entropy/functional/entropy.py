r"""Shannon entropy of discrete distributions, from probabilities or from logits, in nats.

The textbook forms fail where attention is used: ``-p * log(p)``, ``torch.special.entr`` and ``torch.xlogy`` have a
NaN gradient when a masked key has probability exactly 0, and ``log(p + eps)`` is biased. Here every entry that does
not take part is replaced before the logarithm, so that value and gradient are finite, and the arithmetic runs in
float32 or wider also under autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _at_least_float32(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, got {x.dtype}")
    return x if x.dtype == torch.float64 else x.float()


def _taking_part(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as bool in the shape of ``x``; any non-zero value takes part, whatever the dtype."""
    if mask is None:
        return None
    try:
        return (mask != 0).expand_as(x)
    except RuntimeError as error:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} cannot be broadcast to the distribution's shape {tuple(x.shape)}"
        ) from error


def _divide_by_log_count(h: Tensor, valid: Tensor, dim: int) -> Tensor:
    count = valid.sum(dim).to(h.dtype)
    # One instance is uniform and collapsed at once: log 1 = 0, and its normalised entropy is defined as 1.
    several = count > 1
    normalised = h / torch.where(several, count, 2.0).log()
    return torch.where(several, normalised, (count == 1).to(h.dtype))


def entropy(probs: Tensor, dim: int = -1, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
    r"""Shannon entropy of each distribution along a dimension, in nats.

    .. math:: H = -\sum_j p_j \log p_j

    The probabilities are taken as they are, not rescaled to sum 1. Where logits exist prefer
    :func:`entropy_from_logits`: probabilities below the smallest number of their dtype (1e-7 in float16) are lost.

    Args:
        probs: probabilities, any shape.
        dim: the dimension that sums to 1.
        mask: non-zero where an entry takes part, broadcastable to ``probs`` (bool, uint8 or float).
        normalize: divide by the log of the number of entries that take part, so that uniform gives 1; a
            distribution over one entry gives 1.

    Returns:
        The shape of ``probs`` without ``dim``, float32 or wider; 0 where every entry is masked.

    Raises:
        ValueError: if ``mask`` cannot be broadcast to ``probs``.
        TypeError: if ``probs`` is not floating-point.

    Reference:
        Shannon (1948), theorem 2.

    Example:
        >>> entropy(torch.full((1, 4), 0.25))
        tensor([1.3863])
    """
    p = _at_least_float32(probs)
    valid = _taking_part(p, mask)
    with torch.autocast(p.device.type, enabled=False):
        if valid is not None:
            p = torch.where(valid, p, 0.0)
        h = -(p * torch.where(p > 0, p, 1.0).log()).sum(dim)
        if not normalize:
            return h
        return _divide_by_log_count(h, torch.ones_like(p, dtype=torch.bool) if valid is None else valid, dim)


def entropy_from_logits(logits: Tensor, dim: int = -1, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
    r"""Shannon entropy of the softmax of logits, in nats, without forming its logarithm's singular terms.

    .. math:: H = \log \sum_j e^{s_j} - \sum_j p_j s_j, \qquad
        \frac{\partial H}{\partial s_k} = -p_k (\log p_k + H)

    Both terms are computed relative to the largest logit, so no large numbers cancel. The gradient vanishes at
    uniform and at collapsed distributions.

    Args:
        logits: unnormalised log-probabilities, any shape; ``-inf`` marks an entry that does not take part.
        dim: the dimension of the softmax.
        mask: non-zero where an entry takes part, broadcastable to ``logits`` (bool, uint8 or float).
        normalize: divide by the log of the number of entries that take part (see :func:`entropy`).

    Returns:
        The shape of ``logits`` without ``dim``, float32 or wider; 0 where every entry is masked. Masked entries
        get a gradient of exactly 0.

    Raises:
        ValueError: if ``mask`` cannot be broadcast to ``logits``.
        TypeError: if ``logits`` is not floating-point.

    Reference:
        Shannon (1948), theorem 2; the form is that of a flash-attention row: log-sum-exp minus mean logit.

    Example:
        >>> entropy_from_logits(torch.tensor([0.0, 0.0, float("-inf")]))
        tensor(0.6931)
    """
    s = _at_least_float32(logits)
    chosen = _taking_part(s, mask)
    with torch.autocast(s.device.type, enabled=False):
        valid = s.detach() != -torch.inf
        if chosen is not None:
            valid = valid & chosen
        filled = torch.where(valid, s, -torch.inf)
        top = filled.detach().amax(dim, keepdim=True)
        # H is invariant to a shift of the logits, so the largest one can be a constant to autograd.
        # The floor keeps e * z at 0 where the difference of two extreme logits overflows to -inf.
        floor = torch.finfo(s.dtype).min
        z = torch.where(valid, (s - torch.where(top == -torch.inf, 0.0, top)).clamp(min=floor), 0.0)
        e = torch.where(valid, z.exp(), 0.0)
        total = e.sum(dim)
        total = torch.where(total > 0, total, 1.0)
        h = total.log() - (e * z).sum(dim) / total
        if not normalize:
            return h
        return _divide_by_log_count(h, valid, dim)


def top_k_entropy_from_logits(
    logits: Tensor, k: int, dim: int = -1, mask: Tensor | None = None, normalize: bool = False
) -> Tensor:
    r"""Entropy of the softmax over the ``k`` largest logits, in nats.

    Equal to keeping the ``k`` largest probabilities and rescaling them to sum 1, without the NaN that this gives
    when a kept probability underflows. Bounded by :math:`\log k` whatever the number of instances; gradient flows
    through the selected entries only. With ``k`` at least the number of entries it is :func:`entropy_from_logits`.

    Args:
        logits: unnormalised log-probabilities, any shape.
        k: how many entries to keep, at least 1.
        dim: the dimension of the softmax.
        mask: non-zero where an entry takes part, broadcastable to ``logits``.
        normalize: divide by the log of the number of entries kept.

    Returns:
        The shape of ``logits`` without ``dim``, float32 or wider.

    Raises:
        ValueError: if ``k`` is below 1, or ``mask`` cannot be broadcast to ``logits``.

    Reference:
        The top-k option of AEM's public code (k = 100); the option is not in the paper.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    s = _at_least_float32(logits)
    chosen = _taking_part(s, mask)
    if chosen is not None:
        s = torch.where(chosen, s, -torch.inf)
    if k < s.shape[dim]:
        s = s.topk(k, dim).values
    return entropy_from_logits(s, dim, normalize=normalize)


def effective_number(probs: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    r"""How many entries a distribution is spread over: :math:`e^H`, between 1 and the number of entries.

    Args:
        probs: probabilities, any shape.
        dim: the dimension that sums to 1.
        mask: non-zero where an entry takes part, broadcastable to ``probs``.

    Returns:
        The shape of ``probs`` without ``dim``, float32 or wider; 1 where every entry is masked.

    Reference:
        Hill (1973), the diversity number of order 1.
    """
    return entropy(probs, dim, mask).exp()


def effective_number_from_logits(logits: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    r"""How many entries the softmax of logits is spread over: :math:`e^H`; see :func:`effective_number`.

    Args:
        logits: unnormalised log-probabilities, any shape.
        dim: the dimension of the softmax.
        mask: non-zero where an entry takes part, broadcastable to ``logits``.

    Returns:
        The shape of ``logits`` without ``dim``, float32 or wider.
    """
    return entropy_from_logits(logits, dim, mask).exp()
