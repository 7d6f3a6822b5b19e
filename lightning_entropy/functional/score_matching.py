"""The linear algebra of score matching on a spline basis, and of maximum likelihood in the same basis."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_entropy.functional.quadrature import panel_nodes
from lightning_entropy.functional.splines import antiderivative_coefficients, bspline_basis, derivative_coefficients

_CHUNK = 1 << 15
_FINE = 4  # quadrature panels in each knot interval
_NEWTON = 50
_FOLDS = 5
_SMOOTHINGS = (0.0, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)


def knot_panels(breaks: Tensor) -> Tensor:
    """Edges of the quadrature panels between knots."""
    shares = torch.arange(_FINE, dtype=torch.float64) / _FINE
    return torch.cat([(breaks[:-1, None] + breaks.diff()[:, None] * shares).flatten(), breaks[-1:]])


class Moments(NamedTuple):
    """Sums over the samples of each fold, ``(folds, ...)``."""

    gram: Tensor  # b b^T
    slope: Tensor  # b'
    integral: Tensor  # the integral of b


def spline_moments(z: Tensor, w: Tensor, breaks: Tensor) -> Moments:
    """The sums over weighted samples, in chunks, each sample in a fold at random (the same in every call)."""
    count = breaks.numel() + 2
    eye = torch.eye(count, dtype=torch.float64)
    falls, rises = derivative_coefficients(eye, breaks, 3), antiderivative_coefficients(eye, breaks, 3)
    gram = torch.zeros(_FOLDS, count, count, dtype=torch.float64)
    slope, integral = torch.zeros_like(gram[..., 0]), torch.zeros_like(gram[..., 0])
    order = torch.randperm(z.numel(), generator=torch.Generator().manual_seed(0))
    for fold, members in enumerate(order.chunk(_FOLDS)):
        for index in members.split(_CHUNK):
            part, weight = z[index], w[index]
            inside = part.clamp(float(breaks[0]), float(breaks[-1]))
            between = (part == inside).double() * weight
            b = bspline_basis(inside, breaks, 3)
            gram[fold] += b.T @ (b * weight[:, None])
            slope[fold] += (between @ bspline_basis(inside, breaks, 2)) @ falls
            integral[fold] += (weight @ bspline_basis(inside, breaks, 4)) @ rises
            integral[fold] += (weight * (part - inside)) @ b  # the logarithm is linear in the tails
    return Moments(gram, slope, integral)


def solve_score(matrix: Tensor, slope: Tensor) -> Tensor:
    """The coefficients of the score."""
    return -torch.linalg.solve(matrix + 1e-10 * torch.eye(len(slope), dtype=torch.float64), slope)


def best_smoothing(folds: Moments, rough: Tensor) -> float:
    """The largest penalty whose loss on the folds left out is within a standard error of the best one's."""
    losses = torch.zeros(len(_SMOOTHINGS), _FOLDS, dtype=torch.float64)
    for i, strength in enumerate(_SMOOTHINGS):
        for k, (gram, slope) in enumerate(zip(folds.gram, folds.slope)):
            c = solve_score(folds.gram.sum(0) - gram + strength * rough, folds.slope.sum(0) - slope)
            losses[i, k] = 0.5 * c @ gram @ c + c @ slope
    excess = losses - losses[losses.sum(1).argmin()]
    allowed = excess.std(1) / math.sqrt(_FOLDS)
    return max(s for s, near in zip(_SMOOTHINGS, (excess.mean(1) <= allowed).tolist()) if near)


def roughness(breaks: Tensor) -> Tensor:
    """Quadratic form that is 0 for a linear score and large for a wavy one."""
    eye = torch.eye(breaks.numel() + 2, dtype=torch.float64)
    second = derivative_coefficients(derivative_coefficients(eye, breaks, 3), breaks, 2)
    z, w = panel_nodes(breaks, 4)
    values = bspline_basis(z, breaks, 1) @ second
    return values.T @ (values * w[:, None])


def maximum_likelihood(c: Tensor, moment: Tensor, breaks: Tensor, penalty: Tensor) -> Tensor | None:
    """Newton's method for maximum likelihood with the integrated basis as sufficient statistics; None: no gain."""
    eye = torch.eye(len(c), dtype=torch.float64)
    rises = antiderivative_coefficients(eye, breaks, 3)
    low, high = float(breaks[0]), float(breaks[-1])
    z, w = panel_nodes(
        torch.cat(
            [
                torch.linspace(low - 16, low, 9).double(),
                knot_panels(breaks)[1:-1],
                torch.linspace(high, high + 16, 9).double(),
            ]
        )
    )
    inside = z.clamp(low, high)
    statistics = bspline_basis(inside, breaks, 4) @ rises + (z - inside)[:, None] * bspline_basis(inside, breaks, 3)

    def log_mass(at: Tensor) -> Tensor:
        return torch.logsumexp(statistics @ at + w.log(), 0)

    def loss(at: Tensor) -> float:
        return float(log_mass(at) - moment @ at + 0.5 * at @ penalty @ at)

    best = loss(c)
    for _ in range(_NEWTON):
        p = torch.softmax(statistics @ c + w.log(), 0)
        mean = p @ statistics
        covariance = statistics.T @ (statistics * p[:, None]) - mean[:, None] * mean
        gradient = mean - moment + penalty @ c
        move = torch.linalg.solve(covariance + penalty + 1e-9 * eye, gradient)
        size, moved = 1.0, False
        while size > 1e-4 and not moved:
            trial = loss(c - size * move)
            if math.isfinite(trial) and trial < best:
                gain, best, c, moved = best - trial, trial, c - size * move, True
            size /= 2
        if not moved or gain < 1e-10:
            break
    return c if bool(torch.isfinite(c).all()) else None


__all__ = [
    "Moments",
    "best_smoothing",
    "knot_panels",
    "maximum_likelihood",
    "roughness",
    "solve_score",
    "spline_moments",
]
