"""Largest and median absolute values over depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_entropy.observe.massive_activations import LayerMagnitude

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def magnitude_figure(magnitudes: Sequence[LayerMagnitude]) -> Figure:
    """Both on a logarithmic axis, massive layers marked.

    Args:
        magnitudes: in the order of depth.
    """
    from matplotlib.figure import Figure

    depth = range(len(magnitudes))
    figure = Figure(figsize=(max(5.0, 0.35 * len(magnitudes) + 2), 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(depth, [m.top for m in magnitudes], "o-", markersize=3, label="largest |h|")
    axes.plot(depth, [m.median for m in magnitudes], "o-", markersize=3, label="median |h|")
    marked = [i for i, m in enumerate(magnitudes) if m.massive]
    if marked:
        axes.plot(marked, [magnitudes[i].top for i in marked], "r^", markersize=7, label="massive")
    if any(m.top > 0 for m in magnitudes):
        axes.set_yscale("log")
    axes.set_xticks(list(depth), [m.layer for m in magnitudes], rotation=90, fontsize="x-small")
    axes.set_title("Size of the layers' outputs")
    axes.legend(fontsize="small")
    return figure


__all__ = ["magnitude_figure"]
