"""What ``vit-stability`` adds to a comparison: numbers of a run's stability, and loss and entropy over its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_entropy.recipes.comparison_figures import COLORS, mean_and_spread
from lightning_entropy.recipes.comparison_result import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS = "train/loss_step"
# What AttentionEntropyMonitor logs: the lowest head, the mean over heads and layers, and shares of the heads.
LOWEST_HEAD, MEAN = "attention_entropy/min", "attention_entropy/mean"
COLLAPSED, OVERLOADED = "attention_entropy/collapsed_fraction", "attention_entropy/overloaded_fraction"
# title, where a run keeps it ("steps" or "curves"), name, scale of the axis
PANELS = (
    ("training cross-entropy", "steps", LOSS, "log"),
    ("attention entropy, lowest head (normalised)", "steps", LOWEST_HEAD, "linear"),
    ("attention entropy, mean over heads (normalised)", "steps", MEAN, "linear"),
    ("validation accuracy", "curves", "val/accuracy", "linear"),
)


def summarize(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers of a run from what was logged in it.

    Args:
        record: with ``steps`` and ``curves``, as :func:`~lightning_entropy.recipes.run_record.train_and_test` makes it.

    Returns:
        ``train_loss``: mean over the steps of the last epoch, None if one was not finite. ``lowest_entropy``: of any
        head in any reading, normalised. ``final_entropy``: mean over the heads in the last reading; ``collapsed`` and
        ``overloaded``: shares of the heads in it. ``diverged``: 1 if a loss was not finite, else 0.
    """
    losses = record["curves"].get("train/loss") or [None]

    def kept(name: str) -> list[float | None]:
        return list(record["steps"].get(name, {}).get("value", ()))

    def last(name: str) -> float | None:
        return next((value for value in reversed(kept(name)) if value is not None), None)

    return {
        "train_loss": losses[-1],
        "lowest_entropy": min((value for value in kept(LOWEST_HEAD) if value is not None), default=None),
        "final_entropy": last(MEAN),
        "collapsed": last(COLLAPSED),
        "overloaded": last(OVERLOADED),
        "diverged": float(None in losses or None in kept(LOSS)),
    }


def _mean_over_runs(runs: Sequence[Mapping[str, Any]], place: str, name: str) -> dict[str, list[float | None]] | None:
    """Mean and standard deviation over the runs of a variant; None where no run has a value."""
    found: list[tuple[list[int], list[float | None]]] = []
    for run in runs:
        kept = run[place].get(name)
        if kept:
            found.append((kept["step"], kept["value"]) if place == "steps" else (list(range(1, len(kept) + 1)), kept))
    if not any(value is not None for _, values in found for value in values):
        return None
    where = max((at for at, _ in found), key=len)  # a run that diverged is shorter
    mean, spread = mean_and_spread([values for _, values in found])

    def plain(values: np.ndarray) -> list[float | None]:
        return [float(value) if math.isfinite(value) else None for value in values]

    return {"at": [float(x) for x in where], "mean": plain(mean), "std": plain(spread)}


def numbers(comparison: Comparison) -> dict[str, Any]:
    """What :func:`draw` draws: variant -> name -> ``at`` (step, or epoch from 1), ``mean``, ``std`` over the runs."""
    found: dict[str, Any] = {}
    for variant in comparison.variants:
        runs = [run for run in comparison.runs if run["variant"] == variant]
        curves = {name: _mean_over_runs(runs, place, name) for _, place, name, _ in PANELS}
        found[variant] = {"runs": len(runs), **{name: curve for name, curve in curves.items() if curve is not None}}
    return found


def draw(comparison: Comparison) -> Figure:
    """Loss, entropy and accuracy of every variant over training; a band for the standard deviation over the runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    shown = numbers(comparison)
    axes = figure.subplots(2, 2).ravel()
    for axis, (title, place, name, scale) in zip(axes, PANELS):
        for number, (variant, curves) in enumerate(shown.items()):
            if name not in curves:
                continue
            at, mean, std = (np.array(curves[name][key], dtype=float) for key in ("at", "mean", "std"))
            color = COLORS[number % len(COLORS)]
            axis.plot(at, mean, color=color, label=variant, linewidth=1.5)
            if curves["runs"] > 1:
                low = np.maximum(mean - std, mean / 10) if scale == "log" else mean - std
                axis.fill_between(at, low, mean + std, color=color, alpha=0.12, linewidth=0)
        axis.set_yscale(scale)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step" if place == "steps" else "epoch", fontsize=9)
        if name in (LOWEST_HEAD, MEAN):
            axis.set_ylim(0, 1.02)
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    columns = max(len(handles), 1)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return figure


__all__ = ["draw", "numbers", "summarize"]
