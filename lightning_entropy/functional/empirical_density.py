r"""A density from samples, by score matching on a spline basis.

Differentiating a kernel density estimate does not give a usable score: the bandwidth that is right for the density is
too small for its derivative. Score matching (Hyvarinen 2005) estimates the score itself. With s = c . b for cubic
B-splines b,

    minimise over c   E[ (c . b)^2 / 2 + c . b' ],   hence   c = -(E b b^T + penalty)^{-1} E b'

which is one linear solve. The basis is constant beyond the outer knots, so that no boundary terms arise. The density is
the exponential of the integral of the score: value, score and distribution function belong to each other.

Ours are the penalty on second differences (it shrinks towards a normal density) and the refinement: score matching is
blind to the relative mass of modes with nothing between them; where the fitted distribution function misses that of the
samples by more than a percent, Newton steps of maximum likelihood in the same basis follow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_entropy.functional.density import Density
from lightning_entropy.functional.quadrature import graded_edges, panel_nodes
from lightning_entropy.functional.score_matching import (
    best_smoothing,
    knot_panels,
    maximum_likelihood,
    roughness,
    solve_score,
    spline_moments,
)
from lightning_entropy.functional.splines import antiderivative_coefficients, bspline_basis

_CELLS = 2048  # of the distribution function's table
_LEAST_FALL = 0.5  # of the logarithm of the density over a further length of the support: a tail must fall


class EmpiricalDensity(Density):
    """A measured density, made by :meth:`fit`.

    Attributes:
        count: number of samples it was fitted to.
        distance: largest distance between its distribution function and the samples' own (Kolmogorov-Smirnov).
        refined: whether maximum likelihood followed the score matching.
    """

    analytic = False

    def __init__(self, breaks: Tensor, coefficients: Tensor, *, loc: float, scale: float) -> None:
        super().__init__(loc, scale)
        self.breaks = breaks  # in standard units, like everything inside
        self.coefficients = coefficients
        self.count, self.distance, self.refined = 0, math.nan, False
        self._integral = antiderivative_coefficients(coefficients, breaks, 3)
        ends = bspline_basis(breaks[[0, -1]], breaks, 3) @ coefficients
        least = _LEAST_FALL / float(breaks[-1] - breaks[0])
        self._slopes = (max(float(ends[0]), least), min(float(ends[1]), -least))
        z, w = panel_nodes(knot_panels(breaks))
        inside = bspline_basis(z, breaks, 4) @ self._integral
        peak = float(inside.max())
        mass = float((w * (inside - peak).exp()).sum())
        tails = [math.exp(float(self._integral[i]) - peak) / abs(s) for i, s in zip((0, -1), self._slopes)]
        self._log_mass = peak + math.log(mass + sum(tails))
        edges = torch.linspace(float(breaks[0]), float(breaks[-1]), _CELLS + 1, dtype=torch.float64)
        z, w = panel_nodes(edges, 8)
        pieces = (w * self._log_density(z).exp()).view(_CELLS, 8).sum(1)
        below = math.exp(float(self._integral[0]) - self._log_mass) / self._slopes[0]
        self._edges = edges
        self._cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), pieces.cumsum(0)]) + below

    @classmethod
    def fit(
        cls,
        samples: Tensor,
        *,
        weights: Tensor | None = None,
        knots: int | Tensor = 32,
        smoothing: float | None = None,
        coverage: float = 0.998,
        refine: bool = True,
    ) -> EmpiricalDensity:
        """Fit a density to samples.

        Args:
            samples: any shape, a hundred finite values or more; ties from rounding do no harm.
            weights: non-negative weight of each sample, the shape of ``samples``; None: equal.
            knots: number of knots, at quantiles of the samples; or their places, increasing.
            smoothing: strength of the penalty on waves, >= 0; None takes the one under which a held-out fifth of
                the samples fits best.
            coverage: mass between the outer knots; the score is constant beyond them.
            refine: allow maximum likelihood where score matching misses the mass of modes.

        Returns:
            The density, float64 on the CPU.

        Raises:
            ValueError: if there are too few samples, a sample is not finite, or all are equal.

        Reference:
            Hyvarinen, Estimation of Non-Normalized Statistical Models by Score Matching, JMLR 6 (2005).

        Example:
            >>> samples = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
            >>> density = EmpiricalDensity.fit(samples)
            >>> bool((density.score(torch.tensor([-1.0, 1.0])) - torch.tensor([1.0, -1.0])).abs().max() < 0.1)
            True
        """
        x = samples.detach().double().flatten().cpu()
        if x.numel() < 100:
            raise ValueError(f"samples must hold at least 100 values, got {x.numel()}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"samples must be finite, got {int((~torch.isfinite(x)).sum())} values that are not")
        placed = knots.detach().double().flatten().cpu() if isinstance(knots, Tensor) else None
        count = int(knots) if placed is None else placed.numel()
        if count < 4 or (placed is not None and not bool((placed.diff() > 0).all())):
            raise ValueError(f"knots must be at least 4, or 4 or more increasing places, got {knots}")
        if not 0.5 <= coverage < 1:
            raise ValueError(f"coverage must be in [0.5, 1), got {coverage}")
        if smoothing is not None and not (math.isfinite(smoothing) and smoothing >= 0):
            raise ValueError(f"smoothing must be finite and >= 0, got {smoothing}")
        x, order = x.sort()
        w = torch.full_like(x, 1 / x.numel()) if weights is None else weights.detach().double().flatten().cpu()[order]
        w = w / w.sum()
        reached = w.cumsum(0) - w / 2  # mass below the middle of each sample
        # Half of the knots even on the logit scale, for the tails, the others even in mass, for the modes.
        outer = math.log((1 + coverage) / (1 - coverage))
        tails = torch.linspace(-outer, outer, count - count // 2, dtype=torch.float64).sigmoid()
        modes = torch.arange(1, count // 2 + 1, dtype=torch.float64) / (count // 2 + 1)
        at = torch.cat([tails, modes]).sort().values
        quantiles = _interpolate(at, reached, x)
        quartiles = _interpolate(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), reached, x)
        loc, spread = float(quartiles[1]), float(quartiles[2] - quartiles[0]) / 1.349
        scale = spread if spread > 0 else float(x.std())
        if not scale > 0:
            raise ValueError(f"samples must differ from one another, got {x.numel()} times {x[0].item():g}")
        z = (x - loc) / scale
        breaks = _apart((quantiles - loc) / scale) if placed is None else (placed - loc) / scale
        effective = 1 / float((w * w).sum())
        folds = spline_moments(z, w, breaks)
        rough = float(folds[0].sum(0).trace()) / effective * roughness(breaks)
        strength = best_smoothing(folds, rough) if smoothing is None else smoothing
        gram, slope, moment = (part.sum(0) for part in folds)
        penalty = strength * rough
        c = solve_score(gram + penalty, slope)
        density = cls(breaks, c, loc=loc, scale=scale)
        density.distance = _distance(density, x, reached)
        if refine and density.distance > 0.01 + 1 / math.sqrt(effective):
            better = maximum_likelihood(c, moment, breaks, min(strength, 1.0) * rough)
            if better is not None:
                refined = cls(breaks, better, loc=loc, scale=scale)
                refined.distance = _distance(refined, x, reached)
                if refined.distance < density.distance:
                    density, density.refined = refined, True
        density.count = x.numel()
        if density.distance > 0.05:
            warnings.warn(
                f"EmpiricalDensity.fit: the fitted distribution function misses that of the samples by "
                f"{density.distance:.2f}. Values that repeat (atoms) have no density: drop them, or raise "
                f"knots={count}.",
                stacklevel=2,
            )
        return density

    def _inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x.double().cpu() - self.loc) / self.scale
        return z, z.clamp(float(self.breaks[0]), float(self.breaks[-1]))

    def _log_density(self, z: Tensor) -> Tensor:
        return bspline_basis(z.flatten(), self.breaks, 4).matmul(self._integral).view(z.shape) - self._log_mass

    def log_pdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.log_pdf`."""
        z, inside = self._inside(x)
        beyond = z - inside
        tail = torch.where(beyond < 0, self._slopes[0], self._slopes[1]) * beyond
        return (self._log_density(inside) + tail - math.log(self.scale)).to(x)

    def score(self, x: Tensor) -> Tensor:
        """See :meth:`Density.score`; constant beyond the outer knots."""
        z, inside = self._inside(x)
        s = bspline_basis(inside.flatten(), self.breaks, 3).matmul(self.coefficients).view(z.shape)
        s = torch.where(z < self.breaks[0], self._slopes[0], torch.where(z > self.breaks[-1], self._slopes[1], s))
        return (s / self.scale).to(x)

    def cdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.cdf`."""
        z, inside = self._inside(x)
        width = float(self._edges[1] - self._edges[0])
        at = (inside - self._edges[0]) / width
        cell = at.detach().floor().clamp(0, _CELLS - 1).long()
        t = at - cell
        left, right = self._cumulative[cell], self._cumulative[cell + 1]
        p = self._log_density(self._edges).exp() * width
        a, b, rise = p[cell], p[cell + 1], right - left
        body = left + t * (a + t * (3 * rise - 2 * a - b + t * (a + b - 2 * rise)))  # cubic Hermite
        beyond = z - inside
        lower = self._cumulative[0] * (self._slopes[0] * beyond.clamp(max=0)).exp()
        upper = 1 - (1 - self._cumulative[-1]) * (self._slopes[1] * beyond.clamp(min=0)).exp()
        out = torch.where(z < self.breaks[0], lower, torch.where(z > self.breaks[-1], upper, body))
        return out.to(x)

    def nodes(self, breaks: Iterable[float] = ()) -> tuple[Tensor, Tensor]:
        """See :meth:`Density.nodes`."""
        inner = [(point - self.loc) / self.scale for point in breaks]
        low, high = float(self.breaks[0]), float(self.breaks[-1])
        tails = (32 / self._slopes[0], -32 / self._slopes[1])
        edges = torch.cat(
            [
                graded_edges(low - tails[0], low, 24, inner),
                knot_panels(self.breaks),
                graded_edges(low, high, 96, inner),
                graded_edges(high, high + tails[1], 24, inner),
            ]
        )
        z, w = panel_nodes(torch.unique(edges))
        x = self.loc + self.scale * z
        return x, w * self.scale * self.pdf(x)

    @property
    def mean(self) -> float:
        """First moment."""
        return float(self.expectation(lambda x: x))

    def __repr__(self) -> str:
        how = "score matching, refined by likelihood" if self.refined else "score matching"
        return (
            f"EmpiricalDensity({self.count:,} samples, {how}, mean={self.mean:.4g}, std={self.std:.4g}, "
            f"distance={self.distance:.2g})"
        )


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    right = torch.searchsorted(x, at).clamp(1, x.numel() - 1)
    share = ((at - x[right - 1]) / (x[right] - x[right - 1]).clamp(min=1e-300)).clamp(0, 1)
    return y[right - 1] + share * (y[right] - y[right - 1])


def _apart(breaks: Tensor) -> Tensor:
    """The breaks without those that nearly coincide (ties), evened out where a gap would hold almost no samples."""
    least = float(breaks[-1] - breaks[0]) * 2e-4
    kept = [float(breaks[0])]
    for value in breaks[1:].tolist():
        if value - kept[-1] > least:
            kept.append(value)
    if len(kept) < 4:
        return torch.linspace(kept[0] - 1e-3, kept[-1] + 1e-3, 4, dtype=torch.float64)
    return torch.tensor(kept, dtype=torch.float64)


def _distance(density: EmpiricalDensity, x: Tensor, reached: Tensor) -> float:
    distinct, where = torch.unique_consecutive(x, return_inverse=True)
    middle = torch.zeros_like(distinct).scatter_reduce(0, where, reached, "mean", include_self=False)
    return float((density.cdf(distinct) - middle).abs().max())


__all__ = ["EmpiricalDensity"]
