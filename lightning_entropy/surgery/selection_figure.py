"""The picture of a selection."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_entropy.surgery.selection import Selection


def selection_figure(selection: Selection) -> Figure:
    """The score of every weight in the order of the ranking; chosen ones in colour, bounds as open arrows.

    Args:
        selection: what was chosen.

    Returns:
        A figure without pyplot; the axis is logarithmic where the scores span more than a factor of 20.
    """
    from matplotlib.figure import Figure

    rows = selection.rows
    figure = Figure(figsize=(max(5.0, 0.16 * len(rows) + 2), 4.2), layout="constrained")
    axis = figure.subplots()
    kinds = {
        "chosen": ([i for i, r in enumerate(rows) if r.chosen], "o", "C1"),
        "left": ([i for i, r in enumerate(rows) if not r.chosen and r.exact], "o", "0.6"),
        "left, at least": ([i for i, r in enumerate(rows) if not r.chosen and not r.exact], "^", "0.8"),
    }
    for label, (places, marker, colour) in kinds.items():
        places = [i for i in places if math.isfinite(rows[i].score)]
        if places:
            values = [rows[i].score for i in places]
            axis.plot(places, values, marker, color=colour, markersize=4, linestyle="none", label=label)
    finite = [abs(row.score) for row in rows if math.isfinite(row.score)]
    if finite and min(finite) > 0 and max(finite) > 20 * min(finite) and all(row.score > 0 for row in rows):
        axis.set_yscale("log")
    axis.set_ylabel(selection.by.replace("_", " ") + (f" / {selection.normalize}" if selection.normalize else ""))
    if len(rows) <= 60:
        axis.set_xticks(range(len(rows)), [row.name for row in rows], rotation=90, fontsize="xx-small")
    else:
        axis.set_xlabel("rank")
    axis.set_title(f"{len(selection)} of {len(rows)} weights chosen, {selection.parameters:,} parameters")
    if finite:
        axis.legend(fontsize="small")
    return figure


__all__ = ["selection_figure"]
