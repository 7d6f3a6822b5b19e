"""The picture of a spectral report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_entropy.observe.spectral_report import SpectralReport

_PANELS = (
    ("condition number", "kappa", True),
    ("over its shape's", "shape_kappa", True),
    ("deficit a dimension", "deficit_per_dimension", False),
    ("stable rank", "stable_rank", False),
)


def spectral_figure(report: SpectralReport) -> Figure:
    """Four panels over the order of the weights, a colour a shape: what is shape shows as bands of one colour.

    Args:
        report: at least one row.

    Returns:
        A figure without pyplot. Values that are infinite are marked at the upper edge.
    """
    from matplotlib.figure import Figure

    rows = report.rows
    shapes = list(dict.fromkeys((row.rows, row.columns) for row in rows))
    figure = Figure(figsize=(max(6.0, 0.16 * len(rows) + 2.5), 8), layout="constrained")
    axes = figure.subplots(len(_PANELS), 1, sharex=True)
    for axis, (label, name, logarithmic) in zip(axes, _PANELS):
        for i, shape in enumerate(shapes):
            places = [j for j, row in enumerate(rows) if (row.rows, row.columns) == shape]
            values = [getattr(rows[j], name) for j in places]
            finite = [(j, v) for j, v in zip(places, values) if math.isfinite(v)]
            colour = f"C{i % 10}"
            text = " x ".join(map(str, shape)) if name == "kappa" else None
            axis.plot([j for j, _ in finite], [v for _, v in finite], "o", color=colour, markersize=4, label=text)
            beyond = [j for j, v in zip(places, values) if not math.isfinite(v)]
            axis.plot(beyond, [0.98] * len(beyond), "^", color=colour, transform=axis.get_xaxis_transform())
        if logarithmic:
            axis.set_yscale("log")
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
    resolvable = [row.resolvable_kappa if math.isfinite(row.resolvable_kappa) else math.nan for row in rows]
    axes[0].plot(range(len(rows)), resolvable, "_", color="0.5", label="resolvable")
    axes[0].legend(fontsize="x-small", ncols=2)
    if len(rows) <= 60:
        axes[-1].set_xticks(range(len(rows)), [row.name for row in rows], rotation=90, fontsize="xx-small")
    axes[0].set_title(f"Spectra of {len(rows)} weights of {report.source}", fontsize="medium")
    return figure


__all__ = ["spectral_figure"]
