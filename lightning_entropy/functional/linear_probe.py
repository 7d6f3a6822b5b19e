r"""Whether a linear map of features predicts targets better than chance: leave-one-out ridge and a permutation test.

.. math:: R^2 = 1 - \frac{\sum_i \lVert y_i - \hat y_{-i}(x_i) \rVert^2}{\sum_i \lVert y_i - \bar y_{-i} \rVert^2}

All n fits that leave one row out follow from one hat matrix, and the statistic of permuted targets from n x n numbers,
so that a few hundred permutations cost next to nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # times the mean eigenvalue of the rows' Gram matrix
_LEAST = 8


class LinearProbe(NamedTuple):
    """What a linear probe of features says.

    Attributes:
        r2: share of the targets' variance that a row's prediction from all other rows explains; below 0 where the mean
            predicts better.
        p_value: how often permuted targets are explained at least as well, by a count that includes the targets as they
            are.
        accuracy: of the same predictions, for classes; NaN for others.
        chance: share of the most frequent class; NaN for others.
        samples: rows.
    """

    r2: float
    p_value: float
    accuracy: float
    chance: float
    samples: int

    def __str__(self) -> str:
        if math.isfinite(self.accuracy):
            told = f"accuracy {self.accuracy:.2f}, most frequent class {self.chance:.2f}"
        else:
            told = f"R^2 {self.r2:.2f}"
        return f"{told}, p = {self.p_value:.2g} on {self.samples} samples"


def linear_probe(features: Tensor, targets: Tensor, *, permutations: int = 199, seed: int = 0) -> LinearProbe:
    """Predict each row's target by ridge regression on all other rows, and compare with permuted targets.

    Under exchangeable rows that have nothing to do with their targets ``p_value <= a`` happens with probability at most
    ``a``, whatever the distributions and however many features: the ridge is chosen anew for each permutation.

    Args:
        features: ``(rows, features)``; the scale of a column does not matter.
        targets: classes ``(rows,)`` of integers, or numbers ``(rows,)`` or ``(rows, outputs)``.
        permutations: of the targets.
        seed: of the permutations.

    Returns:
        :class:`LinearProbe`.

    Raises:
        ValueError: if the rows do not fit, are fewer than 8, are not finite, or all targets are the same.

    Example:
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> found = linear_probe(x, (x[:, 0] > 0).long())
        >>> found.p_value, found.accuracy > found.chance
        (0.005, True)
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    if features.dim() != 2 or targets.shape[:1] != features.shape[:1] or targets.dim() not in (1, 2):
        raise ValueError(
            "features must be (rows, features) and targets (rows,) or (rows, outputs) of the same rows, got "
            f"{tuple(features.shape)} and {tuple(targets.shape)}"
        )
    n = len(features)
    if n < _LEAST:
        raise ValueError(f"at least {_LEAST} rows are needed, got {n}")
    y, classes = _numbers(targets)
    x = features.detach().double().cpu()
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features and targets must be finite")
    y = y - y.mean(0)
    total = float(y.square().sum())
    if total <= 1e-12:
        raise ValueError("all targets are the same: there is nothing to predict")
    x = x - x.mean(0)
    x = x / x.std(0).clamp(min=1e-12)
    values, vectors = torch.linalg.eigh(x @ x.T)
    values = values.clamp(min=0)
    gram = y @ y.T
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator) for _ in range(permutations)]
    own, shuffled, residuals = math.inf, torch.full((permutations,), math.inf, dtype=torch.float64), y
    for ridge in _RIDGES:
        weight = values / (values + ridge * max(float(values.mean()), 1e-12))
        hat = (vectors * weight) @ vectors.T + 1 / n  # with the intercept
        left = (torch.eye(n, dtype=torch.float64) - hat) / (1 - hat.diagonal()).clamp(min=1e-9)[:, None]
        squares = left.T @ left
        found = float((squares * gram).sum())
        if found < own:
            own, residuals = found, left @ y
        for i, order in enumerate(orders):
            shuffled[i] = min(shuffled[i], (squares * gram[order][:, order]).sum())
    p_value = (1 + int((shuffled <= own * (1 + 1e-12)).sum())) / (permutations + 1)
    r2 = 1 - own / (total * (n / (n - 1)) ** 2)
    accuracy = chance = math.nan
    if classes is not None:
        accuracy = float(((y - residuals + _means(classes)).argmax(1) == classes).double().mean())
        chance = float(classes.bincount().max()) / n
    return LinearProbe(r2, p_value, accuracy, chance, n)


def _numbers(targets: Tensor) -> tuple[Tensor, Tensor | None]:
    if targets.is_floating_point() or targets.dim() == 2:
        values = targets.detach().double().cpu()
        return values if values.dim() == 2 else values[:, None], None
    classes = targets.detach().cpu().unique(return_inverse=True)[1]
    return torch.nn.functional.one_hot(classes).double(), classes


def _means(classes: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(classes).double().mean(0)


__all__ = ["LinearProbe", "linear_probe"]
