r"""EAFO: the direction in which an activation function loses entropy fastest (arXiv 2405.12954), in forward form.

The paper varies the inverse function y of an activation f with output density q and takes the step
eta = -(p(y) y'' / y' + p'(y) y') = -q' / y'. To first order that is, on f itself and without an inverse,

    inverse:  df = f' (p / f')' = p' - p f'' / f'        (the paper's metric: L2 over the outputs, on the inverse)
    forward:  df = (p / f')'                             (L2 over the inputs, on f)
    score:    df = p(u) s(f(u)), s = (ln q)'             (the same as forward where f is monotone; any f)

and f + alpha df with a small alpha > 0 has a smaller entropy. The predicted change is alpha E[df' / f'] for an
invertible f and -alpha E[df s(f)] for any.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_entropy.functional.density import Density
from lightning_entropy.functional.empirical_density import EmpiricalDensity
from lightning_entropy.functional.pushforward import FLAT, Branches, Function, branches, pointwise_derivatives
from lightning_entropy.functional.splines import cubic_table, evaluate_table

METRICS = ("inverse", "forward", "score")
_FINE = 64  # points of the fine grid in each cell of the table
_TAPER = 0.15  # of the support's length, beyond either end
_SAMPLES = 100_000  # for the score of an output that has no closed form
_SCORE_KNOTS = 24
_LEAST_SLOPE = 0.05  # of the base's slope that the corrected activation keeps
_NARROWEST = 0.05  # width of the mollifier, in standard deviations


class EAFODirection(NamedTuple):
    """The correction df of an activation, and what it does to the entropy to first order.

    Attributes:
        table: cubic table of df, ``(4, knots - 1)``, see :func:`lightning_entropy.functional.splines.cubic_table`;
            None where df = p' exactly, in closed form.
        low: where the table begins; df is 0 below.
        high: where it ends; df is 0 above.
        dead: intervals on which the base is flat and left alone, ``(intervals, 2)``, or None.
        ramp: distance from those over which df grows from 0.
        gain: with ``project_gain`` the multiple of f - center that is taken off df, else 0.
        center: mean of f(X).
        slope: dH / d alpha at alpha = 0, in nats.
        slope_standardized: the same for the entropy of f(X) / std.
        largest: the largest alpha under which f + alpha df keeps 1/20 of its slope everywhere; for a base that is not
            monotone the alpha whose correction is a tenth of the standard deviation of f(X).
        mollified: width of the Gaussian that smoothed df, 0 for none.
    """

    table: Tensor | None
    low: float
    high: float
    dead: Tensor | None
    ramp: float
    gain: float
    center: float
    slope: float
    slope_standardized: float
    largest: float
    mollified: float


def eafo_correction(
    base: Function, density: Density, x: Tensor, *, metric: str = "inverse", flat: str = "zero"
) -> Tensor:
    r"""The correction df of the three rules at points ``x``, as it is: not tapered, smoothed or tabulated.

    Args:
        base: the activation f, acts on each element, differentiable.
        density: the density p of its input.
        x: points, any shape.
        metric: ``"inverse"``, ``"forward"`` or ``"score"``, see the module.
        flat: what to do where f' = 0, where the rules are undefined: ``"zero"`` leaves f alone there; ``"limit"``
            (inverse only) takes the limit of small slopes, df = p', which makes CRReLU of ReLU.

    Returns:
        float64, the shape of ``x``.

    Raises:
        ValueError: if an argument is unknown, or the metric needs a monotone base and it is not.

    Example:
        >>> from lightning_entropy.functional import Normal
        >>> x = torch.tensor([1.0])
        >>> df = eafo_correction(lambda u: torch.nn.functional.leaky_relu(u, 1e-6), Normal(), x)
        >>> round(df.item() * -(2 * torch.pi) ** 0.5, 6)  # CRReLU: x exp(-x^2 / 2)
        0.606531
    """
    check_rule(metric, flat)
    found = branches(base, density)
    return _rule(base, density, found, metric, flat)(x.detach().double())


def check_rule(metric: str, flat: str) -> None:
    """Raise a ValueError for an unknown metric or treatment of flat pieces."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if flat not in ("zero", "limit"):
        raise ValueError(f"flat must be 'zero' or 'limit', got {flat!r}")
    if flat == "limit" and metric != "inverse":
        raise ValueError(f"flat='limit' exists in metric='inverse' only: in {metric!r} the limit diverges")


def output_score(base: Function, density: Density, found: Branches) -> Callable[[Tensor], Tensor]:
    """The score of the output density, as a function of the output, by score matching on a spline basis.

    Where f has a minimum the density of the output is infinite and has no score in the ordinary sense; score matching
    gives the direction of steepest descent among splines of the output, which exists.
    """
    u = density.sample(_SAMPLES, generator=torch.Generator().manual_seed(0))
    y, slope, _ = pointwise_derivatives(base, u)
    y = y[slope.abs() >= FLAT]
    if y.numel() < 100:
        raise ValueError("the activation is flat on the support of the density: its output has no density")
    # Even knots: at quantiles they would crowd where the density is infinite.
    ends = torch.quantile(y, torch.tensor([1e-3, 1 - 1e-3], dtype=torch.float64))
    places = torch.linspace(float(ends[0]), float(ends[1]), _SCORE_KNOTS, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the distribution function, which is not used
        return EmpiricalDensity.fit(y, knots=places, refine=False).score


def _rule(base: Function, density: Density, found: Branches, metric: str, flat: str) -> Callable[[Tensor], Tensor]:
    if not bool((found.signs != 0).any()):
        raise ValueError("the activation is flat on the support of the density: there is nothing to correct")
    if metric != "score" and not found.one_way:
        where = [f"{float(e):.3g}" for e in found.edges[1:-1]]
        raise ValueError(
            f"metric={metric!r} needs a monotone activation; this one turns at {', '.join(where[:6])}. Pass "
            "metric='score', which holds for any."
        )
    if metric == "score" and not found.one_way:
        score = output_score(base, density, found)

        def by_score(x: Tensor) -> Tensor:
            y, slope, _ = pointwise_derivatives(base, x)
            return torch.where(slope.abs() < FLAT, 0.0, density.pdf(x) * score(y))

        return by_score

    def by_slopes(x: Tensor) -> Tensor:
        _, slope, curvature = pointwise_derivatives(base, x)
        dead = slope.abs() < FLAT
        safe = torch.where(dead, 1.0, slope)
        bend = torch.where(dead, 0.0, curvature / safe)
        df = density.pdf(x) * (density.score(x) - bend)
        if metric != "inverse":
            df = df / safe
        return df if flat == "limit" else torch.where(dead, 0.0, df)

    return by_slopes


def _has_jump(values: Tensor) -> bool:
    steps = values.diff().abs()
    beside = torch.maximum(torch.roll(steps, 1), torch.roll(steps, -1))[1:-1]
    return bool(((steps[1:-1] > 0.05 * values.abs().max()) & (steps[1:-1] > 5 * beside)).any())


def _mollify(values: Tensor, step: float, width: float) -> Tensor:
    """Convolve with a Gaussian; the result lacks 4 widths at either end."""
    reach = math.ceil(4 * width / step)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) * step / width) ** 2)
    return torch.nn.functional.conv1d(values.view(1, 1, -1), (kernel / kernel.sum()).view(1, 1, -1)).view(-1)


def _taper(x: Tensor, low: float, high: float, width: float) -> Tensor:
    """1 on [low, high], 0 from ``width`` beyond, smooth between."""
    t = torch.minimum((x - low) / width + 1, (high - x) / width + 1).clamp(0, 1)
    return t**3 * (10 - 15 * t + 6 * t**2)


def off_flat_pieces(x: Tensor, dead: Tensor, ramp: Tensor | float) -> Tensor:
    """A factor that is 0 on the intervals ``dead``, 1 further than ``ramp`` from them, and smooth between."""
    points = x.unsqueeze(-1)
    away = torch.maximum(dead[:, 0] - points, points - dead[:, 1]).amin(-1)
    t = (away / ramp).clamp(0, 1)
    return t**3 * (10 - 15 * t + 6 * t**2)


def eafo_direction(
    base: Function,
    density: Density,
    *,
    metric: str = "inverse",
    flat: str = "zero",
    project_gain: bool = False,
    support: tuple[float, float] = (1e-3, 1 - 1e-3),
    knots: int = 64,
    mollify: float | None = None,
) -> EAFODirection:
    """The correction of an activation in a form that a module can evaluate.

    Args:
        base: the activation f, acts on each element, differentiable.
        density: the density of its input.
        metric: see :func:`eafo_correction`.
        flat: see :func:`eafo_correction`.
        project_gain: take off the part of the correction that only scales the output, so that df and f(X) are
            uncorrelated: what is left changes the standardised entropy.
        support: quantiles between which the correction is taken as it is; beyond them it falls smoothly to 0.
        knots: of the cubic table.
        mollify: width of a Gaussian that smooths the correction, in units of x; None smooths only a correction that
            jumps (a base whose second derivative does, as ELU's), as little as the table can hold; 0 never.

    Returns:
        :class:`EAFODirection`. It has no table where df = p' in closed form: analytic density, piecewise linear base,
        ``metric="inverse"``.

    Raises:
        ValueError: if an argument is out of range, or the base does not fit the metric.

    Example:
        >>> from lightning_entropy.functional import Normal
        >>> direction = eafo_direction(torch.nn.functional.softplus, Normal())
        >>> round(direction.slope, 4)  # nats for each unit of alpha
        -0.2716
    """
    check_rule(metric, flat)
    if not 0 < support[0] < support[1] < 1:
        raise ValueError(f"support must be two quantiles with 0 < low < high < 1, got {tuple(support)}")
    if knots < 8:
        raise ValueError(f"knots must be at least 8, got {knots}")
    if mollify is not None and not (math.isfinite(mollify) and mollify >= 0):
        raise ValueError(f"mollify must be finite and >= 0, got {mollify}")
    if project_gain and not math.isfinite(density.std):
        raise ValueError("project_gain needs a density with a finite standard deviation")
    found = branches(base, density)
    rule = _rule(base, density, found, metric, flat)
    inner_low, inner_high = density.quantile(torch.tensor(support, dtype=torch.float64)).tolist()
    beyond = _TAPER * (inner_high - inner_low)
    low, high = inner_low - beyond, inner_high + beyond
    cell = (high - low) / (knots - 1)
    step = cell / _FINE
    quartiles = density.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    if cell > 0.4 * float(quartiles.diff()):
        warnings.warn(
            f"eafo: {knots} knots between {low:.3g} and {high:.3g} are {cell:.2g} apart, and half of the density's "
            f"mass lies within {float(quartiles.diff()):.2g}. Narrow support= or raise knots=.",
            stacklevel=3,
        )
    x, w = density.nodes([*found.breaks, low, high])
    y, slope, curvature = pointwise_derivatives(base, x)
    center = float((w * y).sum())
    variance = float((w * (y - center) ** 2).sum())

    grid = torch.linspace(low, high, (knots - 1) * _FINE + 1, dtype=torch.float64)
    least = max(_NARROWEST * (inner_high - inner_low) / 6, cell)
    pieces = [e for e, s in zip(found.edges.unfold(0, 2, 1).tolist(), found.signs.tolist()) if s == 0]
    pieces = [ends for ends in pieces if ends[1] > low and ends[0] < high and ends[1] - ends[0] > 1e-6 * (high - low)]
    still = torch.tensor(pieces, dtype=torch.float64) if pieces and flat == "zero" else None

    def eased(at: Tensor) -> Tensor:
        return rule(at) if still is None else rule(at) * off_flat_pieces(at, still, least)

    raw = eased(grid)
    jumps = _has_jump(raw)
    width = mollify if mollify is not None else (least if jumps else 0.0)
    dead = slope.abs() < FLAT
    straight = float((curvature * w).abs().max()) == 0 and (flat == "limit" or float(w[dead].sum()) < 1e-6)
    closed = density.analytic and metric == "inverse" and straight and width == 0 and not jumps
    table: Tensor | None = None
    if closed:

        def correction(at: Tensor) -> Tensor:
            return density.pdf_derivative(at)

    else:
        if width > 0:
            margin = step * math.ceil(4 * width / step)
            extra = round(margin / step)
            wide = torch.linspace(low - margin, high + margin, grid.numel() + 2 * extra, dtype=torch.float64)
            raw = _mollify(eased(wide), step, width)
        table = cubic_table((raw * _taper(grid, inner_low, inner_high, beyond))[::_FINE], cell)
        held = table

        def correction(at: Tensor) -> Tensor:
            df = evaluate_table(at, held, low, high)
            return df if still is None else df * off_flat_pieces(at, still, least)

    df, df_slope, _ = pointwise_derivatives(correction, x)
    covariance = float((w * df * (y - center)).sum())
    gain = covariance / variance if project_gain else 0.0
    alive = w * (~dead)
    if found.one_way:
        free = torch.where(dead, 1.0, slope)
        first_order = float((alive * (df_slope / free - gain)).sum())
    else:
        first_order = -float((alive * df * output_score(base, density, found)(y)).sum()) - gain * float(alive.sum())
    scaled = covariance / variance - gain
    largest = _largest(base, correction, grid, gain) if found.one_way else math.inf
    if not found.one_way:
        peak = float((df - gain * (y - center)).abs()[w > 1e-12].max())
        largest = 0.1 * math.sqrt(variance) / max(peak, 1e-12)
    standardized = first_order - scaled * float(alive.sum())
    return EAFODirection(table, low, high, still, least, gain, center, first_order, standardized, largest, width)


def _largest(base: Function, correction: Function, grid: Tensor, gain: float) -> float:
    _, slope, _ = pointwise_derivatives(base, grid)
    _, change, _ = pointwise_derivatives(correction, grid)
    change = change - gain * slope
    sign = slope.sign()
    against = (slope.abs() >= FLAT) & (change * sign < 0)
    if not bool(against.any()):
        return math.inf
    return float(((1 - _LEAST_SLOPE) * slope.abs()[against] / change.abs()[against]).min())


__all__ = [
    "METRICS",
    "EAFODirection",
    "check_rule",
    "eafo_correction",
    "eafo_direction",
    "off_flat_pieces",
    "output_score",
]
