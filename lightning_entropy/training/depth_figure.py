"""The curves of a layer diagnosis over depth, with the chosen layers marked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_entropy.training.layer_report import LayerDiagnosis

_MOST_NAMES = 32
_BAND = "#f2c879"


def diagnosis_figure(diagnosis: LayerDiagnosis) -> Figure:
    """Draw attention entropy, gradients, their decay, and what changed, over depth.

    Args:
        diagnosis: of at least one layer.

    Returns:
        A figure that pyplot does not know.
    """
    from matplotlib.figure import Figure

    rows = diagnosis.rows
    depth = list(range(len(rows)))
    compared = any(math.isfinite(row.delta_cka) for row in rows)
    panels = 4 if compared else 3
    wide = min(max(6.4, 0.34 * len(rows) + 2.5), 16.0)
    figure = Figure(figsize=(wide, 1.9 * panels + 1.4), layout="constrained")
    axes: list[Any] = list(figure.subplots(panels, 1, sharex=True))

    axes[0].plot(depth, [r.entropy for r in rows], "o-", color="C0", label="mean over heads")
    axes[0].plot(depth, [r.lowest_head for r in rows], ".:", color="C0", alpha=0.7, label="lowest head")
    axes[0].set_ylabel("attention entropy\n/ log(keys)", fontsize=8)
    axes[0].set_ylim(-0.05, 1.05)

    axes[1].plot(depth, [r.gradient or math.nan for r in rows], "o-", color="C3", label="activation gradient")
    if any(math.isfinite(r.relative_gradient) for r in rows):
        relative = [r.relative_gradient or math.nan for r in rows]
        axes[1].plot(depth, relative, ".--", color="C3", alpha=0.7, label="the same / output error")
    parameter = [r.parameter_gradient or math.nan for r in rows]
    axes[1].plot(depth, parameter, "s-", color="C4", markersize=3, linewidth=1, label="parameter gradient")
    axes[1].set_ylabel("gradient norm", fontsize=8)
    shown = [y for line in axes[1].get_lines() for y in line.get_ydata() if y > 0]
    if shown:
        axes[1].set_yscale("log")

    decay = [r.decay if math.isfinite(r.decay) else 0.0 for r in rows]
    axes[2].bar(depth, decay, color=["C3" if d > 0 else "0.7" for d in decay], width=0.6, label="decay of the gradient")
    axes[2].axhline(0, color="0.4", linewidth=0.8)
    axes[2].set_ylabel("decay (nats)", fontsize=8)
    index = axes[2].twinx()
    index.plot(depth, [r.index for r in rows], "D-", color="C2", markersize=3, linewidth=1, label="SKI")
    index.set_ylim(-0.05, 1.05)
    index.tick_params(labelsize=7)
    index.set_ylabel("SKI", fontsize=8, color="C2")

    if compared:
        axes[3].plot(depth, [r.delta_cka for r in rows], "o-", color="C1", label="change, 1 - CKA")
        retained = [r.retained_variance for r in rows]
        axes[3].plot(depth, retained, ".:", color="0.5", label="variance in the shared basis")
        axes[3].set_ylabel("Delta-CKA", fontsize=8)

    chosen = [i for i, row in enumerate(rows) if row.chosen]
    for axis in axes:
        for number, i in enumerate(chosen):
            label = "inflection layer" if axis is axes[0] and number == 0 else None
            axis.axvspan(i - 0.5, i + 0.5, color=_BAND, alpha=0.45, linewidth=0, zorder=0, label=label)
        handles, labels = axis.get_legend_handles_labels()
        if axis is axes[2]:
            more, names = index.get_legend_handles_labels()
            handles, labels = [*handles, *more], [*labels, *names]
        axis.legend(handles, labels, fontsize=7, loc="upper left", bbox_to_anchor=(1.07, 1.0), frameon=False)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    every = max(1, math.ceil(len(rows) / _MOST_NAMES))
    names = [r.layer if len(r.layer) <= 28 else f"...{r.layer[-25:]}" for r in rows]
    axes[-1].set_xticks(depth[::every], names[::every], rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    found = ", ".join(diagnosis.chosen[:6]) + (" ..." if len(chosen) > 6 else "") if chosen else "no inflection layer"
    figure.suptitle(f"{diagnosis.model}, {diagnosis.samples:,} samples: {found}", fontsize=9)
    return figure


__all__ = ["diagnosis_figure"]
