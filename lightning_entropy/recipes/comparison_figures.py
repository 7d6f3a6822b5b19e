"""Figures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_entropy.recipes.paired_statistics import PairedDifference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = Mapping[str, Sequence["float | None"]]

_PANELS = {
    "train/loss": "training cross-entropy",
    "val/loss": "validation cross-entropy",
    "val/accuracy": "validation accuracy",
    "val/auc": "validation AUC",
    "val/entropy": "attention entropy, validation (nats)",
    "val/instance_auc": "instance AUC of attention, validation",
    "val/coverage": "coverage of key instances, validation",
}
# Okabe and Ito's colours, which colour-blind readers tell apart, and two more for comparisons of many.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#888888", "#7F3C00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


def interval_figure(panels: Mapping[str, Sequence[tuple[str, PairedDifference]]], *, baseline: str) -> Figure:
    """Draw paired differences as points with intervals.

    Args:
        panels: title -> (variant, difference) from top to bottom.
        baseline: the variant at 0.
    """
    from matplotlib.figure import Figure

    count = max(len(panels), 1)
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    tallest = max((len(entries) for entries in panels.values()), default=1)
    figure = Figure(figsize=(4.4 * columns, (1.3 + 0.35 * tallest) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, entries) in zip(axes, panels.items()):
        for place, (_, d) in enumerate(entries):
            if math.isfinite(d.low):
                axis.plot([d.low, d.high], [place, place], color=COLORS[1], linewidth=2)
            axis.plot([d.mean], [place], "o", color=COLORS[1])
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_yticks(range(len(entries)), [variant for variant, _ in entries])
        axis.set_ylim(len(entries) - 0.5, -0.5)
        axis.set_title(title, fontsize=10)
        axis.locator_params(axis="x", nbins=5)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(f"paired difference to {baseline}, 95 % interval", fontsize=10)
    return figure


def mean_and_spread(curves: Sequence[Sequence[float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over curves at each place, of those that have a value there; NaN where none has."""
    length = max(len(curve) for curve in curves)
    values = np.full((len(curves), length), np.nan)
    for row, curve in zip(values, curves):
        row[: len(curve)] = [np.nan if value is None else value for value in curve]
    there = np.isfinite(values)
    count = np.maximum(there.sum(axis=0), 1)
    mean = np.where(there, values, 0).sum(axis=0) / count
    spread = np.sqrt((np.where(there, values - mean, 0) ** 2).sum(axis=0) / np.maximum(count - 1, 1))
    mean[~there.any(axis=0)] = np.nan
    return mean, spread


def curve_figure(curves: Mapping[str, Sequence[Curves]]) -> Figure:
    """Draw training curves: a line for the mean over the runs of a variant, a band for the standard
    deviation.

    Args:
        curves: variant -> the curves of its runs.
    """
    from matplotlib.figure import Figure

    def of(variant: str, name: str) -> list[Sequence[float | None]]:
        return [run[name] for run in curves[variant] if any(v is not None for v in run.get(name, ()))]

    shown = [name for name in _PANELS if any(of(variant, name) for variant in curves)]
    columns = min(max(len(shown), 1), 3)
    rows = math.ceil(max(len(shown), 1) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, shown):
        for number, variant in enumerate(curves):
            runs = of(variant, name)
            if not runs:
                continue
            mean, spread = mean_and_spread(runs)
            epochs = np.arange(1, len(mean) + 1)
            color = COLORS[number % len(COLORS)]
            axis.plot(epochs, mean, color=color, label=variant, linewidth=1.5)
            if len(runs) > 1:
                axis.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0)
        axis.set_title(_PANELS[name], fontsize=10)
        axis.set_xlabel("epoch", fontsize=9)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    if shown:
        handles: dict[str, Any] = {}
        for axis in axes[: len(shown)]:
            handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


__all__ = ["COLORS", "MARKERS", "curve_figure", "interval_figure", "mean_and_spread"]
