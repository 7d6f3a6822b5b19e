"""Paired differences between methods, with intervals that know how the runs depend on each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_TINY = 1e-300


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b) by its continued fraction, evaluated as Lentz does."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    value, c, d = 1.0, 1.0, 0.0
    for i in range(500):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or _TINY)
        c = 1 + term / c or _TINY
        value *= c * d
        if i > 0 and abs(c * d - 1) < 1e-15:
            break
    return front * (value - 1) / a


def mean_and_deviation(values: Sequence[float | None]) -> dict[str, Any]:
    """What a figure says of runs.

    Args:
        values: one a run; None and what is not finite are left out.

    Returns:
        ``mean``, and sample standard deviation ``std``, None where there are too few; ``runs``, how many there were.

    Example:
        >>> mean_and_deviation([1.0, 3.0, None])["mean"]
        2.0
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    return {
        "mean": float(np.mean(known)) if known else None,
        "std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "runs": len(known),
    }


def t_cdf(t: float, *, df: float) -> float:
    """Distribution function of Student's t.

    Args:
        t: the value.
        df: degrees of freedom.
    """
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return 1 - tail if t > 0 else tail


def t_quantile(probability: float, *, df: float) -> float:
    """Quantile of Student's t, to about 1e-10.

    Args:
        probability: in (0, 1).
        df: degrees of freedom, positive.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if not 0 < probability < 1 or df <= 0:
        raise ValueError(f"probability must be in (0, 1) and df positive, got {probability} and {df}")
    if probability < 0.5:
        return -t_quantile(1 - probability, df=df)
    low, high = 0.0, 1.0
    while t_cdf(high, df=df) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if t_cdf(middle, df=df) < probability:
            low = middle
        else:
            high = middle
        if high - low < 1e-12 * max(1.0, high):
            break
    return (low + high) / 2


@dataclass(frozen=True)
class PairedDifference:
    """What a method changes on the same folds and seeds.

    Attributes:
        mean: mean difference.
        low: lower end of the confidence interval; NaN with one pair.
        high: upper end of the confidence interval; NaN with one pair.
        wins: pairs in which the method is better; ``None`` where neither direction is.
        pairs: number of pairs.
    """

    mean: float
    low: float
    high: float
    wins: int | None
    pairs: int


def paired_difference(
    values: Sequence[float],
    baseline: Sequence[float],
    *,
    better: int = 1,
    test_per_train: float = 0.0,
    confidence: float = 0.95,
) -> PairedDifference:
    r"""Mean paired difference with a Student-t interval.

    With d_1..d_J the differences and s^2 their variance, the variance of the mean is ``s^2 (1/J +
    n_test/n_train)``. The second term is Nadeau and Bengio's, for runs whose training sets overlap (k folds,
    repeated random splits), where s^2/J is far too small; it is 0 for runs on independent data.

    Args:
        values: the method's values, one a pair.
        baseline: the other method's values, in the same order.
        better: 1 if larger is better, -1 if smaller is, 0 if neither.
        test_per_train: n_test / n_train of overlapping splits, 0 for independent data.
        confidence: of the interval.

    Raises:
        ValueError: if there is no pair or the lengths differ.

    Reference:
        Nadeau and Bengio (2003), "Inference for the generalization error", equation 9; for repeated
        cross-validation Bouckaert and Frank (2004).
    """
    if len(values) != len(baseline) or len(values) == 0:
        raise ValueError(f"there must be as many values as baseline values, got {len(values)}, {len(baseline)}")
    differences = [value - base for value, base in zip(values, baseline)]
    pairs = len(differences)
    mean = math.fsum(differences) / pairs
    wins = sum(d * better > 0 for d in differences) if better else None
    if pairs == 1:
        return PairedDifference(mean, math.nan, math.nan, wins, pairs)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (pairs - 1)
    half = t_quantile((1 + confidence) / 2, df=pairs - 1) * math.sqrt(variance * (1 / pairs + test_per_train))
    return PairedDifference(mean, mean - half, mean + half, wins, pairs)


__all__ = ["PairedDifference", "mean_and_deviation", "paired_difference", "t_cdf", "t_quantile"]
