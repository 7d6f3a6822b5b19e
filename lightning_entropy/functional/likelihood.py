"""Negative log-likelihood of labels under logits, summed, so that batches of unlike sizes add up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 2**24  # logits that are turned into float32 at a time: 64 MiB


class SummedLikelihood(NamedTuple):
    """Sums over the labels that count.

    Attributes:
        nll: negative log-likelihood in nats, a float64 scalar.
        counted: labels that were scored, an int64 scalar.
    """

    nll: Tensor
    counted: Tensor

    def mean(self) -> Tensor:
        """Nats a label; NaN where none counts."""
        return self.nll / self.counted

    def perplexity(self) -> Tensor:
        """The exponential of the mean; infinite where that overflows."""
        return self.mean().exp()


def summed_nll(
    logits: Tensor, labels: Tensor, *, next_token: bool = False, ignore_index: int = -100
) -> SummedLikelihood:
    r"""Negative log-likelihood of labels, summed over those that count.

    .. math:: \sum_{i : y_i \ne \text{ignore}} \Big(\log \sum_c e^{z_{ic}} - z_{i y_i}\Big)

    The mean over a data set is the quotient of the sums over its batches. The mean of the batches' means is another
    number where batches differ in their labels, and so is the perplexity that is made of it.

    Args:
        logits: ``(..., classes)``, any floating type; the sum is taken in float32 or wider.
        labels: ``(...)`` integers.
        next_token: position *t* of the last dimension predicts the label of position *t + 1*, as in causal language
            models whose labels are their input.
        ignore_index: labels that do not count.

    Returns:
        The sum and the number of labels in it.

    Raises:
        ValueError: if the shapes do not fit, or labels are out of range.

    Example:
        >>> summed_nll(torch.zeros(2, 3, 10), torch.zeros(2, 3, dtype=torch.long)).perplexity()
        tensor(10.0000, dtype=torch.float64)
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits must be (..., classes) with labels (...), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if next_token:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    nll, counts = label_nll(logits, labels, ignore_index=ignore_index)
    return SummedLikelihood(nll.double().sum(), counts.sum())


def label_nll(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each label, 0 where it does not count, and which labels count.

    Args:
        logits: ``(..., classes)``.
        labels: ``(...)`` integers.
        ignore_index: labels that do not count.

    Returns:
        ``(...)`` in float32 or wider, and ``(...)`` bool.

    Raises:
        ValueError: if labels are out of range.
    """
    counts = labels != ignore_index
    classes = logits.shape[-1]
    wrong = counts & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        raise ValueError(f"labels must be in 0 ... {classes - 1} or {ignore_index}, got {int(labels[wrong][0])}")
    rows, wanted = logits.reshape(-1, classes), labels.masked_fill(~counts, 0).reshape(-1)
    size = max(1, _AT_ONCE // max(1, classes))
    parts = []
    for some, index in zip(rows.split(size), wanted.split(size), strict=True):
        wide = some if some.dtype == torch.float64 else some.float()
        parts.append(wide.logsumexp(-1) - wide.gather(-1, index[:, None])[:, 0])
    nll = torch.cat(parts).reshape(labels.shape)
    return nll.masked_fill(~counts, 0.0), counts


__all__ = ["SummedLikelihood", "label_nll", "summed_nll"]
