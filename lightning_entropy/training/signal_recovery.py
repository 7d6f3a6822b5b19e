"""How a signal that was blocked comes back while a model is trained: gradients now over gradients at the start."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_entropy.training.layer_report import LayerDiagnosis

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SignalReading:
    r"""One look at the layers during training.

    Attributes:
        step: optimizer steps taken.
        recovery: geometric mean of :math:`G_\text{now} / G_\text{start}` at the inputs of the chosen layers and of
            those below them: what has come back through what was blocked. NaN where no gradient arrives.
        relative_recovery: the same of G divided by the size of the output error, which falls as the model learns.
        gradient_norm: layer -> G at its output.
        entropy: layer -> attention entropy divided by that of uniform attention; NaN without attention.
        loss: of the batch.
    """

    step: int
    recovery: float
    relative_recovery: float
    gradient_norm: dict[str, float] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)
    loss: float = math.nan

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def signal_recovery(start: LayerDiagnosis, now: LayerDiagnosis, chosen: Iterable[str], step: int) -> SignalReading:
    """Compare two diagnoses of the same batch.

    Args:
        start: before the first step.
        now: of the same layers.
        chosen: names of the blocked layers.
        step: of now.

    Raises:
        ValueError: if the two have unlike layers or none of them was chosen.
    """
    names = set(chosen)
    if start.layers != now.layers or not names & set(now.layers):
        raise ValueError(
            f"the two diagnoses are of {start.layers} and {now.layers}, and {sorted(names)} must be among both"
        )
    last = max(i for i, layer in enumerate(now.layers) if layer in names)
    raw, relative = [], []
    for before, after in zip(start.rows[: last + 1], now.rows[: last + 1]):
        a, b = before.input_gradient, after.input_gradient
        if a > 0 and b > 0:
            raw.append(math.log(b / a))
            errors = start.output_error / now.output_error if now.output_error else math.nan
            relative.append(raw[-1] + math.log(errors) if errors > 0 else math.nan)
    return SignalReading(
        step,
        _geometric(raw),
        _geometric(relative),
        {row.layer: row.gradient for row in now.rows},
        {row.layer: row.entropy for row in now.rows},
        now.loss,
    )


def _geometric(logs: list[float]) -> float:
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def recovery_figure(readings: list[SignalReading], title: str) -> Figure:
    """Recovery over the steps, and the gradient over depth at each reading.

    Args:
        readings: at least one.
        title: above.

    Returns:
        A figure that pyplot does not know.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [r.step for r in readings]
    left.plot(steps, [r.recovery for r in readings], "o-", label="G now / G at the start")
    left.plot(steps, [r.relative_recovery for r in readings], ".--", label="the same, G / output error")
    left.axhline(1.0, color="0.5", linewidth=0.8)
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_ylabel("recovery")
    left.legend(fontsize=7)
    colors = matplotlib.colormaps["viridis"]
    for i, reading in enumerate(readings):
        values = [g or math.nan for g in reading.gradient_norm.values()]
        label = f"step {reading.step}" if i in (0, len(readings) - 1) else None
        right.plot(range(len(values)), values, color=colors(i / max(1, len(readings) - 1)), label=label)
    right.set_yscale("log")
    right.set_xlabel("layer")
    right.set_ylabel("activation gradient")
    right.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


__all__ = ["SignalReading", "recovery_figure", "signal_recovery"]
