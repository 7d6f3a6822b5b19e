"""How well the halves of pairs find each other by their embeddings: recall at 1 and contrastive likelihood."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 1024  # queries whose similarities are held at a time


class RetrievalScores(NamedTuple):
    """Means over both directions.

    Attributes:
        nll: contrastive negative log-likelihood in nats; ``log N`` where all embeddings are alike.
        recall_at_1: share of the halves whose most similar counterpart is their own.
    """

    nll: Tensor
    recall_at_1: Tensor


def paired_retrieval(first: Tensor, second: Tensor, *, temperature: float = 0.05) -> RetrievalScores:
    r"""Contrastive likelihood and recall at 1 of paired embeddings, by cosine.

    With :math:`s_{ij} = \cos(a_i, b_j)`,

    .. math:: \text{nll} = -\frac{1}{N} \sum_i \log \frac{e^{s_{ii} / \tau}}{\sum_j e^{s_{ij} / \tau}}

    and the same from *b* to *a*, averaged. Where *k* candidates are equally the most similar and the right one is among
    them, it counts 1 / *k*: embeddings that have collapsed into one point have a recall of 1 / *N*, as chance has.

    Args:
        first: ``(N, D)``.
        second: ``(N, D)``; row *i* belongs to row *i* of ``first``.
        temperature: what similarities are divided by. 0.05 is that of sentence-transformers' training.

    Returns:
        Scalars, float32 or wider.

    Raises:
        ValueError: if the shapes differ, there are no pairs, or the temperature is not positive.

    Reference:
        Oord et al., Representation Learning with Contrastive Predictive Coding, arXiv 1807.03748.

    Example:
        >>> paired_retrieval(torch.eye(3), torch.eye(3)).recall_at_1
        tensor(1.)
    """
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise ValueError(
            f"pairs of embeddings must be two tensors (N, D) with N > 0, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive, got {temperature}")
    a, b = (F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1) for x in (first, second))
    nll, hits = a.new_zeros(()), a.new_zeros(())
    for queries, keys in ((a, b), (b, a)):
        for start in range(0, len(queries), _ROWS):
            similar = queries[start : start + _ROWS] @ keys.T
            rows = torch.arange(len(similar), device=similar.device)
            matching = similar[rows, start + rows]
            nll = nll + (torch.logsumexp(similar / temperature, -1) - matching / temperature).sum()
            best = similar.max(-1).values
            hits = hits + ((matching == best) / (similar == best[:, None]).sum(-1)).sum()
    count = 2 * len(a)
    return RetrievalScores(nll / count, hits / count)


__all__ = ["RetrievalScores", "paired_retrieval"]
