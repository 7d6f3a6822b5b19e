"""A number of every head of every layer over training: heatmaps at a few steps, and the layers' means over all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SYMBOLS = ("o", "x", "+", "^")
_MOST_NAMES = 24  # of layers beside a heatmap


def layer_head_figure(
    readings: Mapping[int, Mapping[str, Sequence[float]]],
    *,
    label: str,
    low: float = 0.0,
    high: float = 1.0,
    panels: int = 4,
    marks: Mapping[str, Mapping[int, Mapping[str, Sequence[bool]]]] | None = None,
) -> Figure:
    """Draw layers x heads at a few steps from the first to the last, and each layer's mean over all steps.

    Args:
        readings: step -> layer -> a number for each head; layers may have unlike numbers of heads, and steps unlike
            layers. NaN stays empty.
        label: what the numbers are.
        low: the number at the lower end of the colours.
        high: the number at their upper end.
        panels: how many heatmaps at most.
        marks: what a symbol on a head says -> step -> layer -> whether it is there, for each head.

    Returns:
        A figure that pyplot does not know.

    Raises:
        ValueError: if there is nothing to draw.

    Example:
        >>> figure = layer_head_figure({0: {"a": [0.1, 0.9]}, 50: {"a": [0.2, 0.8]}}, label="entropy")
        >>> len(figure.axes)  # two heatmaps, a colour bar, the curves
        4
    """
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(name for reading in readings.values() for name in reading))
    if not layers:
        raise ValueError("layer_head_figure: there are no readings to draw")
    steps = sorted(readings)
    shown = [steps[i] for i in sorted({round(p) for p in np.linspace(0, len(steps) - 1, min(panels, len(steps)))})]
    heads = max(len(values) for reading in readings.values() for values in reading.values())
    tall = min(max(0.22 * len(layers), 1.6), 9.0)
    curves = len(steps) > 1
    names = [name if len(name) <= 32 else f"...{name[-29:]}" for name in layers]
    wide = 2.0 + 0.07 * max(len(name) for name in names) + max(1.4, 0.16 * heads) * len(shown)
    figure = Figure(figsize=(max(wide, 6.0), tall + 3.0 * curves + 1), layout="constrained")
    upper: Any = figure
    lower: Any = None
    if curves:
        parts: Any = figure.subfigures(2, 1, height_ratios=[tall + 0.8, 3.0])
        upper, lower = parts
    axes = list(np.ravel(upper.subplots(1, len(shown), sharey=True)))
    image: Any = None
    for axis, step in zip(axes, shown):
        grid = _grid(readings[step], layers, heads)
        image = axis.imshow(grid, vmin=low, vmax=high, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_title(f"step {step:,}", fontsize=9)
        axis.set_xlabel("head", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        for symbol, (what, where) in zip(_SYMBOLS, (marks or {}).items()):
            points = [
                (head, row)
                for row, name in enumerate(layers)
                for head, marked in enumerate(where.get(step, {}).get(name, ()))
                if marked
            ]
            if points:
                x, y = zip(*points)
                edge = {"facecolors": "none", "edgecolors": "white"} if symbol == "o" else {"color": "red"}
                axis.scatter(x, y, marker=symbol, s=18, linewidths=1.2, label=what, **edge)
    every = max(1, math.ceil(len(layers) / _MOST_NAMES))
    places = range(0, len(layers), every)
    axes[0].set_yticks(list(places), [names[i] for i in places], fontsize=7)
    upper.colorbar(image, ax=axes).set_label(label, fontsize=8)
    _legend(upper, axes)
    if lower is not None:
        _curves(lower.subplots(), readings, dict(zip(layers, names)), steps, label)
    return figure


def _grid(reading: Mapping[str, Sequence[float]], layers: Sequence[str], heads: int) -> NDArray[np.float64]:
    grid = np.full((len(layers), heads), np.nan)
    for row, name in enumerate(layers):
        values = reading.get(name, ())
        grid[row, : len(values)] = values
    return grid


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {text: handle for handle, text in zip(*axis.get_legend_handles_labels())}
    if handles:
        legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)
        legend.get_frame().set_facecolor("0.6")  # white symbols are seen on grey


def _curves(
    axis: Any,
    readings: Mapping[int, Mapping[str, Sequence[float]]],
    layers: Mapping[str, str],
    steps: Sequence[int],
    label: str,
) -> None:
    import matplotlib

    colors = matplotlib.colormaps["plasma"](np.linspace(0.0, 0.9, len(layers)))
    for (name, text), color in zip(layers.items(), colors):
        means = []
        for step in steps:
            values = np.asarray(readings[step].get(name, ()), dtype=float)
            values = values[np.isfinite(values)]
            means.append(values.mean() if len(values) else np.nan)
        axis.plot(steps, means, color=color, linewidth=1.3, label=text)
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel(f"{label}\nmean over heads", fontsize=8)
    if len(layers) <= _MOST_NAMES:
        columns = 1 + len(layers) // 13
        axis.legend(fontsize=6, ncols=columns, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


__all__ = ["layer_head_figure"]
