"""Composite Gauss-Legendre quadrature on the real line, graded towards the points where an integrand has a kink.

Everything is float64 on the CPU: these sums are made once, when an activation is built or measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

_POINTS = 16  # of each panel
_HALVINGS = 30  # of the panel beside a break: logarithmic singularities are integrated to about 1e-10


@lru_cache(maxsize=4)
def gauss_legendre(points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1], exact for polynomials of degree ``2 * points - 1``.

    Example:
        >>> x, w = gauss_legendre(3)
        >>> round(float((w * x**4).sum()), 6)
        0.4
    """
    k = torch.arange(1, points, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return nodes, 2 * vectors[0] ** 2


def panel_nodes(edges: Tensor, points: int = _POINTS) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the panels between sorted edges, both ``(panels * points,)``."""
    x, w = gauss_legendre(points)
    half = (edges[1:] - edges[:-1])[:, None] / 2
    middle = (edges[1:] + edges[:-1])[:, None] / 2
    return (middle + half * x).flatten(), (half * w).flatten()


def graded_edges(low: float, high: float, panels: int, breaks: Iterable[float] = ()) -> Tensor:
    """Sorted edges of about ``panels`` panels on [low, high] that shrink by halves towards every break inside."""
    edges = torch.linspace(low, high, panels + 1, dtype=torch.float64)
    width = (high - low) / panels
    steps = width * 0.5 ** torch.arange(_HALVINGS, dtype=torch.float64)
    inside = [point for point in breaks if low < point < high]
    added = [torch.cat([point - steps, torch.tensor([point], dtype=torch.float64), point + steps]) for point in inside]
    if added:
        edges = torch.cat([edges, *added])
        edges = edges[(edges >= low) & (edges <= high)]
    return torch.unique(edges)  # sorted


__all__ = ["gauss_legendre", "graded_edges", "panel_nodes"]
