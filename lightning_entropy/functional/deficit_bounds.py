"""What the condition number says of the entropy deficit of a matrix, and the deficit of the condition number."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def deficit_bounds(condition: Tensor | float, rank: int) -> tuple[Tensor, Tensor]:
    r"""The least and the greatest entropy deficit that a matrix of this condition number can have, in nats.

    .. math:: \log \frac{\kappa + 1/\kappa}{2} \le D \le \frac{r}{2} \log S(\kappa^2) , \qquad
        S(h) = \frac{(h - 1) h^{1/(h-1)}}{e \log h}

    with Specht's ratio S. The left side is attained by two extreme singular values and the rest at the root of the mean
    of their squares.

    Args:
        condition: :math:`\kappa \ge 1`.
        rank: r, the number of singular values.

    Returns:
        Two tensors of the shape of ``condition``, float64.

    Raises:
        ValueError: if a condition number is below 1 or the rank below 1.

    Reference:
        Specht, Zur Theorie der elementaren Mittel (1960).

    Example:
        >>> low, high = deficit_bounds(50.0, 6)
        >>> f"{float(low):.4f} {float(high):.4f}"
        '3.2193 14.3087'
    """
    kappa = torch.as_tensor(condition, dtype=torch.float64)
    if rank < 1 or not bool((kappa >= 1).all()):
        raise ValueError(f"condition and rank must be at least 1, got {condition} and {rank}")
    if rank == 1:
        return torch.zeros_like(kappa), torch.zeros_like(kappa)
    t = kappa.log()
    near = torch.log1p(2 * torch.sinh(t.clamp(max=1.0) / 2).square())
    low = torch.where(t < 1, near, t + torch.log1p((-2 * t).exp()) - math.log(2))
    return low, rank / 2 * _log_specht(2 * t)


def _log_specht(x: Tensor) -> Tensor:
    """The logarithm of S(exp x) for x >= 0, log(expm1(x) / x) + x / expm1(x) - 1, without cancellation."""
    small = x.square() / 8 - x.pow(4) / 576
    y = x.clamp(min=1e-2)
    large = y + torch.log(-torch.expm1(-y)) - y.log() + torch.where(y < 700, y / torch.expm1(y.clamp(max=700)), 0.0) - 1
    return torch.where(x < 1e-2, small, torch.where(torch.isinf(x), x, large))


def condition_bounds_of_deficit(deficit: Tensor | float, rank: int) -> tuple[Tensor, Tensor]:
    r"""The least and the greatest condition number that a matrix of this entropy deficit can have.

    The inverse of :func:`deficit_bounds`: at most :math:`\exp(\operatorname{arcosh}(e^D))`, at least the number whose
    greatest deficit is D.

    Args:
        deficit: :math:`D \ge 0`, in nats.
        rank: r, the number of singular values.

    Returns:
        Two tensors of the shape of ``deficit``, float64.

    Raises:
        ValueError: if a deficit is negative, the rank is below 1, or it is 1 and the deficit is not 0.

    Example:
        >>> low, high = condition_bounds_of_deficit(3.21927574489, 6)
        >>> round(float(high), 6)
        50.0
    """
    d = torch.as_tensor(deficit, dtype=torch.float64)
    if rank < 1 or not bool((d >= 0).all()):
        raise ValueError(f"deficit must be >= 0 and rank >= 1, got {deficit} and {rank}")
    if rank == 1:
        if bool((d > 0).any()):
            raise ValueError(f"a single singular value has no deficit, got {deficit}")
        return torch.ones_like(d), torch.ones_like(d)
    high = (d + torch.log1p((-torch.expm1(-2 * d)).sqrt())).exp()
    target = 2 * d / rank
    below, above = torch.zeros_like(d), 2 * target + (8 * target).sqrt() + 4
    for _ in range(110):  # bisection, to the last bit even near 0
        middle = (below + above) / 2
        too_low = _log_specht(middle) < target
        below, above = torch.where(too_low, middle, below), torch.where(too_low, above, middle)
    return torch.where(torch.isinf(d), d, (above / 2).exp()), high


__all__ = ["condition_bounds_of_deficit", "deficit_bounds"]
