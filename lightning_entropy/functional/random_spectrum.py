"""What the spectrum of a matrix of independent Gaussian numbers has in expectation: the part that is shape alone."""

from __future__ import annotations

import math

import torch


def expected_log_volume(rows: int, columns: int) -> float:
    r"""Expected sum of the log singular values of independent standard normal numbers, in nats.

    With *r* the smaller and *n* the larger side:

    .. math:: \mathbb{E}\, V = \tfrac12 \sum_{i<r} \left[\psi\!\left(\tfrac{n-i}{2}\right) + \ln 2\right]

    Args:
        rows: of the matrix.
        columns: of the matrix.

    Returns:
        The expectation, exact.

    Raises:
        ValueError: if a side is below 1.

    Reference:
        Goodman (1963): the determinant of a Wishart matrix is a product of independent chi-squared numbers.

    Example:
        >>> round(expected_log_volume(16, 48), 3)
        29.356
    """
    small, large = _sides(rows, columns)
    i = torch.arange(small, dtype=torch.float64)
    return float(0.5 * (torch.digamma((large - i) / 2) + math.log(2)).sum())


def expected_entropy_deficit(rows: int, columns: int) -> float:
    r"""Entropy deficit of independent Gaussian numbers of any one variance, in nats, over all *r* dimensions.

    :math:`\frac r2 \ln \frac{\mathbb{E} F^2}{r} - \mathbb{E} V` with :math:`\mathbb{E} F^2 = r n`; the logarithm of the
    expectation stands for the expectation of the logarithm, which differs by about :math:`1 / (r n)`.

    Args:
        rows: of the matrix.
        columns: of the matrix.

    Returns:
        The deficit; about ``r / 2`` for a square matrix, and smaller the longer it is.

    Example:
        >>> round(expected_entropy_deficit(384, 384) / 384, 2), round(expected_entropy_deficit(384, 1536) / 384, 2)
        (0.5, 0.07)
    """
    small, large = _sides(rows, columns)
    return small / 2 * math.log(large) - expected_log_volume(rows, columns)


def expected_stable_rank(rows: int, columns: int) -> float:
    r"""Stable rank of independent Gaussian numbers: :math:`m n / (\sqrt m + \sqrt n)^2`, for large matrices.

    Args:
        rows: :math:`m`.
        columns: :math:`n`.

    Example:
        >>> expected_stable_rank(100, 100)
        25.0
    """
    small, large = _sides(rows, columns)
    return small * large / (math.sqrt(small) + math.sqrt(large)) ** 2


def _sides(rows: int, columns: int) -> tuple[int, int]:
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be >= 1, got {rows} and {columns}")
    return min(rows, columns), max(rows, columns)


__all__ = ["expected_entropy_deficit", "expected_log_volume", "expected_stable_rank"]
