"""Mean and standard deviation of the features over the training instances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_entropy.data.source import BagSource


def feature_moments(source: BagSource, *, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over all instances of some bags.

    Every instance counts the same, so large bags weigh more. Bags are read one at a time and merged in
    float64 (Chan, Golub, LeVeque 1979), so memory does not grow with their number.

    Args:
        source: the bags.
        indices: the bags to fit on: those that train.

    Returns:
        ``mean`` and ``std``, each ``(D,)`` float32; a feature that never varies has ``std`` 1.
    """
    count = 0
    mean = torch.zeros(source.in_features, dtype=torch.float64)
    squares = torch.zeros_like(mean)
    for index in indices:
        features = source.read(index, None).features.double()
        size = len(features)
        if size == 0:
            continue
        centre = features.mean(0)
        delta = centre - mean
        squares += ((features - centre) ** 2).sum(0) + delta**2 * (count * size / (count + size))
        mean += delta * (size / (count + size))
        count += size
    std = (squares / max(count, 1)).sqrt()
    std[std <= 1e-12 * mean.abs().clamp(min=1)] = 1.0
    return mean.float(), std.float()


__all__ = ["feature_moments"]
