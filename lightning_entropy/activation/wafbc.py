"""WAFBC: the worst activation function with boundary conditions (arXiv 2405.12954)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_entropy.functional.density import Density


class WAFBC(nn.Module):
    """The activation with the largest output entropy between two bounds: an affine distribution function.

    Made by :func:`wafbc`. Its output is uniform on [low, high] for inputs of the density; it has no parameter.

    Args:
        density: the density of its input.
        low: lower bound.
        high: upper bound.
    """

    def __init__(self, density: Density, *, low: float, high: float) -> None:
        super().__init__()
        self.density, self.low, self.high = density, low, high

    def forward(self, x: Tensor) -> Tensor:
        """The activation of each element, computed in float32 or wider."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (self.low + (self.high - self.low) * self.density.cdf(wide)).to(x.dtype)

    def extra_repr(self) -> str:
        """The bounds and the density."""
        return f"low={self.low:g}, high={self.high:g}, density={self.density!r}"


def wafbc(density: Density, low: float = 0.0, high: float = 1.0) -> WAFBC:
    """The worst activation function with boundary conditions, ``low + (high - low) * cdf(x)``.

    Among increasing functions onto [low, high] it has the largest output entropy, ln(high - low): the paper's argument
    for why bounded activations (sigmoid, tanh) are poor. EAFO's correction of it is zero.

    Args:
        density: the density of the input.
        low: lower bound.
        high: upper bound, larger.

    Raises:
        ValueError: if a bound is not finite or they are not in order.

    Example:
        >>> from lightning_entropy.functional import Logistic
        >>> worst = wafbc(Logistic())  # the sigmoid
        >>> bool(torch.allclose(worst(torch.ones(1)), torch.sigmoid(torch.ones(1))))
        True
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low and high must be finite with low < high, got {low} and {high}")
    return WAFBC(density, low=float(low), high=float(high))


__all__ = ["WAFBC", "wafbc"]
