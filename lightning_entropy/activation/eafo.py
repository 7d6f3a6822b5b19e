r"""EAFO: entropy-based activation function optimisation (arXiv 2405.12954), as a tool.

Given an activation f and the density p of its input, EAFO takes a step against the gradient of the entropy of f(X):

    f_new(u) = f(u) + alpha df(u),    df = p' - p f'' / f'   (the paper's metric, in forward form)

and lets training move alpha. ReLU, as the limit of leaky ReLUs, under a normal density gives CRReLU's correction. The
worst activation between two bounds, at which the gradient is zero, is the distribution function (WAFBC).

Ours are the forward form, the rules for activations without an inverse, measured densities, the projection that takes
off mere scaling, and that every step says what it was predicted to change and what it did change. Lower entropy is not
higher accuracy; the card says what was seen.
"""

from __future__ import annotations

import copy
import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_entropy.functional.activation_entropy import ActivationEntropy
from lightning_entropy.functional.density import Density
from lightning_entropy.functional.eafo import EAFODirection, eafo_direction, off_flat_pieces
from lightning_entropy.functional.pushforward import Function, branches, pushforward_entropy
from lightning_entropy.functional.splines import evaluate_table

_BACKTRACKS = 12
_ARMIJO = 0.5  # of the predicted decrease that an automatic step must reach where the base is not monotone
_SAME_ATOMS = 1e-3


class EAFOReport(NamedTuple):
    """What a step of EAFO did, in nats, at the step it was built with.

    Attributes:
        metric: the rule.
        step: alpha.
        predicted_dH: change of the entropy to first order.
        measured_dH: change of the entropy. Where atoms are equal, of the mixed entropy; infinite where the base has an
            atom (its entropy is minus infinity) that the new activation has not.
        measured_dH_standardized: the same for f(X) divided by its standard deviation.
        predicted_dH_standardized: to first order.
        mollified: width of the Gaussian that smoothed the correction.
        monotone: whether the new activation never turns; it may have flat pieces.
        before: entropies of the base.
        after: entropies of the new activation.
    """

    metric: str
    step: float
    predicted_dH: float
    measured_dH: float
    measured_dH_standardized: float
    predicted_dH_standardized: float
    mollified: float
    monotone: bool
    before: ActivationEntropy
    after: ActivationEntropy

    def __str__(self) -> str:
        inverse = "monotone" if self.monotone else "not monotone"
        return (
            f"EAFO ({self.metric}): step {self.step:.4g}, entropy {float(self.before.entropy):.4f} -> "
            f"{float(self.after.entropy):.4f} nats (predicted {self.predicted_dH:+.4g}, measured "
            f"{self.measured_dH:+.4g}), standardised {self.measured_dH_standardized:+.4g}; {inverse}"
        )

    def to_json(self) -> str:
        """The report as JSON; numbers that are not finite as null."""
        plain: dict[str, Any] = {}
        for name, value in self._asdict().items():
            if isinstance(value, ActivationEntropy):
                plain[name] = {k: _finite(float(v)) for k, v in value._asdict().items()}
            else:
                plain[name] = _finite(value) if isinstance(value, float) else value
        return json.dumps(plain, indent=2)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class EAFOActivation(nn.Module):
    """An activation with an EAFO correction, ``base(x) + step * (df(x) - gain * (base(x) - center))``.

    Made by :func:`eafo`. ``step`` is a parameter of shape (1,) that training moves; it may turn negative, and nothing
    pushes it towards lower entropy. The correction is a cubic table in float32, or p' in closed form; it is computed
    in float32 or wider whatever the module is cast to, and is 0 beyond the table (its derivative, too).

    Args:
        base: the activation.
        direction: the correction.
        density: the density it was made for.
        step: initial step.
        report: what the step did.
    """

    step: nn.Parameter

    def __init__(
        self,
        base: nn.Module | Function,
        *,
        direction: EAFODirection,
        density: Density,
        step: float,
        report: EAFOReport | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.density = density
        self.report = report
        self.step = nn.Parameter(torch.tensor([step], dtype=torch.float32))
        self.table: Tensor | None
        self.bounds: Tensor | None  # low, high, ramp
        self.dead: Tensor | None
        self.projection: Tensor | None  # gain, center
        self._take(direction, torch.float32)

    def _take(self, direction: EAFODirection, dtype: torch.dtype) -> None:
        held = direction.table is not None
        ends, gain = (direction.low, direction.high, direction.ramp), (direction.gain, direction.center)
        self.register_buffer("table", None if direction.table is None else direction.table.to(dtype))
        self.register_buffer("bounds", torch.tensor(ends, dtype=dtype) if held else None)
        self.register_buffer("dead", None if direction.dead is None or not held else direction.dead.to(dtype))
        self.register_buffer("projection", torch.tensor(gain, dtype=dtype) if direction.gain else None)

    def _apply(self, fn: Any, recurse: bool = True) -> EAFOActivation:
        super()._apply(fn, recurse)
        # A bfloat16 step would not move by small updates, and a bfloat16 table is no smooth function.
        self.step.data = self.step.data.float()
        if self.step.grad is not None:
            self.step.grad = self.step.grad.float()
        for name, value in self._buffers.items():
            if value is not None:
                self._buffers[name] = value.float()
        return self

    def correction(self, x: Tensor) -> Tensor:
        """The correction without the projection, float32 or wider."""
        x = x if x.dtype == torch.float64 else x.float()
        if self.table is None:
            reach = 40 * self.density.scale  # p' is 0 there; an infinite x would give 0 times infinity
            return self.density.pdf_derivative(x.clamp(self.density.loc - reach, self.density.loc + reach))
        assert self.bounds is not None
        low, high, ramp = self.bounds.to(x.dtype)
        df = evaluate_table(x, self.table.to(x.dtype), low, high)
        return df if self.dead is None else df * off_flat_pieces(x, self.dead.to(x.dtype), ramp)

    def forward(self, x: Tensor) -> Tensor:
        """The corrected activation of each element."""
        y = self.base(x.clone() if getattr(self.base, "inplace", False) else x)
        with torch.autocast(x.device.type, enabled=False):
            added = self.correction(x)
            if self.projection is not None:
                gain, center = self.projection.to(added.dtype)
                added = added - gain * (y.to(added.dtype) - center)
            return (y.to(added.dtype) + self.step.to(added.dtype) * added).to(y.dtype)

    @property
    def predicted_dH(self) -> float:
        """Predicted change of the entropy in nats at the initial step; NaN without a report."""
        return math.nan if self.report is None else self.report.predicted_dH

    @property
    def measured_dH(self) -> float:
        """Measured change of the entropy in nats at the initial step; NaN without a report."""
        return math.nan if self.report is None else self.report.measured_dH

    @property
    def measured_dH_standardized(self) -> float:
        """Measured change of the standardised entropy in nats at the initial step; NaN without a report."""
        return math.nan if self.report is None else self.report.measured_dH_standardized

    def extra_repr(self) -> str:
        """The step, the density and the kind of correction."""
        kind = "closed form" if self.table is None else f"{self.table.shape[1] + 1} knots"
        return f"step={self.step.item():.4g}, density={self.density!r}, {kind}"


def _in_float64(base: nn.Module | Function) -> Function:
    """A copy for measuring: float64, evaluation mode, on the CPU, not in place."""
    if not isinstance(base, nn.Module):
        return base
    twin = copy.deepcopy(base).cpu().double().eval().requires_grad_(False)
    return twin


def _changed(before: ActivationEntropy, after: ActivationEntropy) -> tuple[float, float]:
    if float(before.atom_mass - after.atom_mass) > _SAME_ATOMS:
        return math.inf, math.inf
    if float(after.atom_mass - before.atom_mass) > _SAME_ATOMS:
        return -math.inf, -math.inf
    raw = float(after.mixed - before.mixed)
    return raw, raw - float((1 - before.atom_mass) * (after.std / before.std).log())


def eafo(
    base: nn.Module | Function,
    density: Density,
    *,
    metric: str = "inverse",
    step: float | str = "auto",
    project_gain: bool = False,
    support: tuple[float, float] = (1e-3, 1 - 1e-3),
    knots: int = 64,
    mollify: float | None = None,
    flat: str = "zero",
    max_step: float = 1.0,
) -> EAFOActivation:
    """One step of entropy-based activation function optimisation, as a module with a learnable step.

    Args:
        base: an activation that acts on each element, differentiable: a module or a function.
        density: the density of its input, analytic (:class:`lightning_entropy.functional.Normal`, ...) or measured
            (:class:`lightning_entropy.functional.EmpiricalDensity`).
        metric: ``"inverse"`` (the paper's), ``"forward"``, or ``"score"``, which holds for bases that are not
            monotone, too.
        step: alpha; ``"auto"`` takes the largest up to ``max_step`` under which a monotone base keeps 1/20 of its
            slope everywhere. For other bases it halves alpha until the entropy falls by at least half of what is
            predicted.
        project_gain: take off the part of the correction that only scales the output. Without it a step lowers the
            entropy mostly by shrinking the output.
        support: quantiles of the density between which the correction is taken as it is; it falls to 0 beyond them.
        knots: of the table.
        mollify: see :func:`lightning_entropy.functional.eafo_direction`.
        flat: ``"zero"`` leaves flat pieces alone; ``"limit"`` treats them as the limit of small slopes: of ReLU under
            a standard normal it makes CRReLU.
        max_step: bound of an automatic step.

    Returns:
        :class:`EAFOActivation`, with ``predicted_dH``, ``measured_dH``, ``measured_dH_standardized`` and ``report``.

    Raises:
        ValueError: if an argument is out of range, or the base is not monotone and the metric needs it to be.

    Reference:
        A Method on Searching Better Activation Functions, arXiv 2405.12954, section on EAFO.

    Example:
        >>> from lightning_entropy.functional import Normal
        >>> activation = eafo(nn.Softplus(), Normal(), step=1e-3)
        >>> round(activation.predicted_dH * 1e4, 2), round(activation.measured_dH * 1e4, 2)
        (-2.72, -2.72)
    """
    if isinstance(step, str):
        if step != "auto":
            raise ValueError(f"step must be a number or 'auto', got {step!r}")
    elif not math.isfinite(step):
        raise ValueError(f"step must be finite, got {step}")
    if not (math.isfinite(max_step) and max_step > 0):
        raise ValueError(f"max_step must be finite and > 0, got {max_step}")
    function = _in_float64(base)
    direction = eafo_direction(
        function,
        density,
        metric=metric,
        flat=flat,
        project_gain=project_gain,
        support=support,
        knots=knots,
        mollify=mollify,
    )
    before = pushforward_entropy(function, density)
    one_way = branches(function, density).one_way

    def build(alpha: float) -> tuple[EAFOActivation, EAFOReport]:
        made = EAFOActivation(base, direction=direction, density=density, step=alpha)
        exact = EAFOActivation(function, direction=direction, density=density, step=alpha)
        exact.step.data = torch.tensor([alpha], dtype=torch.float64)
        exact._take(direction, torch.float64)
        after = pushforward_entropy(exact, density)
        raw, standardized = _changed(before, after)
        made.report = EAFOReport(
            metric=metric,
            step=alpha,
            predicted_dH=alpha * direction.slope,
            measured_dH=raw,
            measured_dH_standardized=standardized,
            predicted_dH_standardized=alpha * direction.slope_standardized,
            mollified=direction.mollified,
            monotone=branches(exact, density).one_way,
            before=before,
            after=after,
        )
        return made, made.report

    alpha = min(direction.largest, max_step) if isinstance(step, str) else float(step)
    made, report = build(alpha)
    if isinstance(step, str) and not one_way:
        for _ in range(_BACKTRACKS):
            if math.isinf(report.measured_dH) or report.measured_dH <= _ARMIJO * report.predicted_dH:
                break
            alpha /= 2
            made, report = build(alpha)
    return made


__all__ = ["EAFOActivation", "EAFOReport", "eafo"]
