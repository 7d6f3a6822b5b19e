"""Cubic splines: a basis to fit a score on, and a table to evaluate a correction from."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_knots(breaks: Tensor, degree: int) -> Tensor:
    """The breaks with both ends repeated, so that the basis is complete up to the ends."""
    return torch.cat([breaks[:1].expand(degree), breaks, breaks[-1:].expand(degree)])


def bspline_basis(x: Tensor, breaks: Tensor, degree: int) -> Tensor:
    """All B-splines at every point, by the recursion of Cox and de Boor.

    Args:
        x: points inside ``[breaks[0], breaks[-1]]``, ``(points,)``.
        breaks: strictly increasing, ``(intervals + 1,)``.
        degree: 3 for cubic.

    Returns:
        ``(points, intervals + degree)``; every row sums to 1.

    Reference:
        de Boor, A Practical Guide to Splines, 1978, chapter X.

    Example:
        >>> b = bspline_basis(torch.linspace(0, 1, 5), torch.linspace(0, 1, 3), 3)
        >>> b.shape, bool(torch.allclose(b.sum(-1), torch.ones(5)))
        (torch.Size([5, 5]), True)
    """
    knots = padded_knots(breaks, degree)
    intervals = breaks.numel() - 1
    cell = (torch.searchsorted(breaks, x.contiguous(), right=True) - 1).clamp(0, intervals - 1)
    # The degree + 1 functions that are not zero in a cell, grown from degree 0 upwards.
    values = [torch.ones_like(x)]
    for d in range(1, degree + 1):
        grown = [torch.zeros_like(x) for _ in range(d + 1)]
        for j, value in enumerate(values):
            left = knots[cell + degree + 1 + j - d]
            right = knots[cell + degree + 1 + j]
            share = value / (right - left)
            grown[j] = grown[j] + (right - x) * share
            grown[j + 1] = grown[j + 1] + (x - left) * share
        values = grown
    columns = cell[:, None] + torch.arange(degree + 1, device=x.device)
    out = torch.zeros(x.numel(), intervals + degree, dtype=x.dtype, device=x.device)
    return out.scatter(1, columns, torch.stack(values, 1))


def derivative_coefficients(coefficients: Tensor, breaks: Tensor, degree: int) -> Tensor:
    """Coefficients of the derivative in the basis of one degree less; along the first axis."""
    knots = padded_knots(breaks, degree)
    count = coefficients.shape[0]
    spans = knots[1 + degree : count + degree] - knots[1:count]
    return degree * coefficients.diff(dim=0) / spans.reshape(-1, *[1] * (coefficients.dim() - 1))


def antiderivative_coefficients(coefficients: Tensor, breaks: Tensor, degree: int) -> Tensor:
    """Coefficients of the integral from the first break, in the basis of one degree more; along the first axis."""
    knots = padded_knots(breaks, degree)
    count = coefficients.shape[0]
    spans = (knots[degree + 1 :] - knots[:count]).reshape(-1, *[1] * (coefficients.dim() - 1))
    summed = (coefficients * spans / (degree + 1)).cumsum(0)
    return torch.cat([torch.zeros_like(summed[:1]), summed])


def cubic_table(values: Tensor, step: float) -> Tensor:
    """Coefficients of the cubic spline through values on an even grid, flat at both ends.

    Args:
        values: ``(knots,)``.
        step: distance of the knots.

    Returns:
        ``(4, knots - 1)``: in cell k with t in [0, 1] the spline is ``c[0] + t (c[1] + t (c[2] + t c[3]))``.
    """
    count = values.numel()
    # Slopes times the step, from continuity of the second derivative; zero at the ends.
    matrix = torch.diag(torch.full((count,), 4.0, dtype=values.dtype))
    one = torch.ones(count - 1, dtype=values.dtype)
    matrix = matrix + torch.diag(one, 1) + torch.diag(one, -1)
    matrix[0], matrix[-1] = 0.0, 0.0
    matrix[0, 0] = matrix[-1, -1] = 1.0
    right = torch.zeros_like(values)
    right[1:-1] = 3 * (values[2:] - values[:-2])
    slopes = torch.linalg.solve(matrix, right)
    rise, left, end = values.diff(), slopes[:-1], slopes[1:]
    return torch.stack([values[:-1], left, 3 * rise - 2 * left - end, left + end - 2 * rise])


def evaluate_table(x: Tensor, table: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """A cubic table at ``x``: constant beyond its ends, NaN for NaN."""
    cells = table.shape[1]
    low, high = torch.as_tensor(low, dtype=x.dtype), torch.as_tensor(high, dtype=x.dtype)
    at = (torch.clamp(x, min=low, max=high) - low) * (cells / (high - low))
    cell = torch.nan_to_num(at.detach()).floor().clamp(0, cells - 1).long()
    t = at - cell
    c0, c1, c2, c3 = table[:, cell]
    return c0 + t * (c1 + t * (c2 + t * c3))


__all__ = [
    "antiderivative_coefficients",
    "bspline_basis",
    "cubic_table",
    "derivative_coefficients",
    "evaluate_table",
]
