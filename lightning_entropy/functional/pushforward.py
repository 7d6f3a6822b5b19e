r"""Entropy of f(X) for a known density of X, by quadrature over the preimages of every value.

The density of the output is :math:`q(v) = \sum_{u: f(u) = v} p(u) / |f'(u)|`. For an invertible f the entropy is
H(X) + E ln |f'(X)|; where f is not invertible that formula is wrong, and the sum over preimages is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_entropy.functional.activation_entropy import ActivationEntropy
from lightning_entropy.functional.density import Density

FLAT = 1e-8  # slopes below are flat: there an output has no density
_GRID = 4001
_ITERATIONS = 64
_LEAST_MASS = 1e-6  # of an atom; the neighbourhood of a critical point is flat, too, and has no mass

Function = Callable[[Tensor], Tensor]


def pointwise_derivatives(function: Function, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, first and second derivative of a function that acts on each element, float64.

    Raises:
        ValueError: if the result has another shape, is not finite, or does not depend on ``x``.

    Example:
        >>> y, slope, curvature = pointwise_derivatives(lambda x: x**3, torch.tensor([2.0]))
        >>> y.item(), slope.item(), curvature.item()
        (8.0, 12.0, 12.0)
    """
    x = x.detach().double().requires_grad_()
    with torch.enable_grad():
        try:
            y = function(x * 1)  # a copy, which an activation may overwrite
        except RuntimeError as error:
            raise ValueError(
                f"the activation must be one function of each element, for a tensor of any shape: {error}"
            ) from error
        if y.shape != x.shape:
            raise ValueError(f"the activation must keep the shape, got {tuple(x.shape)} -> {tuple(y.shape)}")
        if not y.requires_grad:
            raise ValueError("the activation must be differentiable: its output does not depend on its input")
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        second: Tensor | None = None
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
    if not bool(torch.isfinite(y).all() & torch.isfinite(first).all()):
        raise ValueError("the activation must be finite with a finite derivative on the support of the density")
    return y.detach(), first.detach(), torch.zeros_like(first) if second is None else second.detach()


class Branches(NamedTuple):
    """The intervals on which a function rises (1), falls (-1) or is flat (0), and its kinks."""

    edges: Tensor  # (intervals + 1,)
    signs: Tensor  # (intervals,)
    kinks: list[float]

    @property
    def breaks(self) -> list[float]:
        """Every point at which a quadrature should split its panels."""
        return [*self.edges[1:-1].tolist(), *self.kinks]

    @property
    def one_way(self) -> bool:
        """Whether the function never turns; it may have flat pieces, but is not flat altogether."""
        return len(set(self.signs.tolist()) - {0}) == 1


def _slope(function: Function, x: Tensor) -> Tensor:
    return pointwise_derivatives(function, x)[1]


def _sign(slope: Tensor) -> Tensor:
    return torch.where(slope.abs() < FLAT, 0, slope.sign().long())


def branches(function: Function, density: Density) -> Branches:
    """Where the function rises, falls and is flat on the support of the density, refined by bisection."""
    x = density.nodes()[0]
    first, last = (math.asinh((float(v) - density.loc) / density.scale) for v in (x.min(), x.max()))
    grid = density.loc + density.scale * torch.linspace(first, last, _GRID, dtype=torch.float64).sinh()
    value, slope, curvature = pointwise_derivatives(function, grid)
    with torch.no_grad():
        if not torch.allclose(function(grid[::2].clone()), value[::2], rtol=1e-6, atol=1e-9):
            raise ValueError("the activation must be one function of each element; this one looks at the others, too")
    sign = _sign(slope)
    changes = (sign[1:] != sign[:-1]).nonzero().flatten()
    left, right = grid[changes], grid[changes + 1]
    before = sign[changes]
    for _ in range(_ITERATIONS if changes.numel() else 0):
        middle = (left + right) / 2
        same = _sign(_slope(function, middle)) == before
        left, right = torch.where(same, middle, left), torch.where(same, right, middle)
    edges = torch.cat([grid[:1], (left + right) / 2, grid[-1:]])
    signs = torch.cat([before, sign[-1:]])
    # A jump of the slope is larger than the curvature on either side explains.
    explained = grid.diff() * torch.maximum(curvature[1:].abs(), curvature[:-1].abs())
    jumps = (slope.diff().abs() > 10 * explained + 1e-6 * slope.abs().max()).nonzero().flatten()
    left, right = grid[jumps], grid[jumps + 1]
    at_left, at_right = slope[jumps], slope[jumps + 1]
    for _ in range(_ITERATIONS if jumps.numel() else 0):
        middle = (left + right) / 2
        at = _slope(function, middle)
        in_left = (at - at_left).abs() > (at_right - at).abs()
        left, right = torch.where(in_left, left, middle), torch.where(in_left, middle, right)
        at_left, at_right = torch.where(in_left, at_left, at), torch.where(in_left, at, at_right)
    return Branches(edges, signs, ((left + right) / 2).tolist())


def _preimage(function: Function, density: Density, low: float, high: float, sign: int, v: Tensor) -> Tensor:
    """The point of a monotone branch with the value v, on the asinh scale, which heavy tails need."""

    def at(t: Tensor) -> Tensor:
        return density.loc + density.scale * t.sinh()

    ends = [math.asinh((u - density.loc) / density.scale) for u in (low, high)]
    left, right = torch.full_like(v, ends[0]), torch.full_like(v, ends[1])
    with torch.no_grad():
        for _ in range(_ITERATIONS):
            middle = (left + right) / 2
            short = (function(at(middle)) - v) * sign < 0
            left, right = torch.where(short, middle, left), torch.where(short, right, middle)
    return at((left + right) / 2)


def output_density(
    function: Function, density: Density, found: Branches, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f(x), q(f(x)), f'(x) and the interval of each x; q is infinite on flat intervals."""
    y, slope, _ = pointwise_derivatives(function, x)
    where = torch.bucketize(x, found.edges[1:-1])
    q = density.pdf(x) / slope.abs().clamp(min=1e-300)
    for k, sign in enumerate(found.signs.tolist()):
        if sign == 0:
            continue
        low, high = float(found.edges[k]), float(found.edges[k + 1])
        ends = pointwise_derivatives(function, found.edges[k : k + 2])[0].sort().values
        others = (where != k) & (y > ends[0]) & (y < ends[1]) & (found.signs[where] != 0)
        if bool(others.any()):
            u = _preimage(function, density, low, high, sign, y[others])
            q[others] += density.pdf(u) / _slope(function, u).abs().clamp(min=1e-300)
    return y, torch.where(found.signs[where] == 0, torch.inf, q), slope, where


def pushforward_entropy(function: Function | nn.Module, density: Density) -> ActivationEntropy:
    r"""Entropy of ``function(X)`` for X with the given density, exact up to quadrature.

    Flat pieces of the function give atoms, the rest a density, and the two are reported apart as
    :func:`lightning_entropy.functional.activation_entropy` does for samples. Several preimages are summed.

    Args:
        function: acts on each element, differentiable; monotone or not.
        density: the density of its input.

    Returns:
        :class:`lightning_entropy.functional.ActivationEntropy`, float64, 0-dimensional.

    Raises:
        ValueError: if the function changes the shape or is not finite on the support.

    Example:
        >>> from lightning_entropy.functional import Normal
        >>> round(pushforward_entropy(torch.tanh, Normal()).entropy.item(), 6)
        0.669804
    """
    found = branches(function, density)
    x, w = density.nodes(found.breaks)
    y, q, _, where = output_density(function, density, found, x)
    flat = found.signs[where] == 0
    masses: dict[float, float] = {}
    for k in torch.unique(where[flat]).tolist():
        here = flat & (where == k)
        mass = float(w[here].sum())
        if mass > _LEAST_MASS:
            value = round(float((w[here] * y[here]).sum()) / mass, 6)
            masses[value] = masses.get(value, 0.0) + mass
    atom_mass = sum(masses.values())
    free = 1 - atom_mass
    total = -float((w[~flat] * q[~flat].log()).sum())  # of a density of mass ``free``
    atoms = -sum(m * math.log(m) for m in masses.values())
    mean = float((w * y).sum())
    std = math.sqrt(float((w * (y - mean) ** 2).sum()))
    if math.isinf(density.std) and float(y[x.abs().argmax()].abs()) > 1e3 * float(y.median().abs() + 1):
        std = math.inf
    entropy = total / free + math.log(free) if free > _LEAST_MASS else math.nan
    within = atoms / atom_mass + math.log(atom_mass) if masses else 0.0
    values = (entropy, entropy - math.log(max(std, 1e-300)), atom_mass, within, atoms + total, std, len(masses))
    return ActivationEntropy(*(torch.tensor(float(v), dtype=torch.float64) for v in values))


__all__ = ["FLAT", "Branches", "branches", "output_density", "pointwise_derivatives", "pushforward_entropy"]
