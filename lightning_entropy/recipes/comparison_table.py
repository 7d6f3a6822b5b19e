"""The table of a comparison: known metrics, their headings, and numbers as they are printed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_entropy.recipes.comparison_result import Comparison, Summary

_MANY = 6  # variants; a row for each of more than these

# name -> (heading, direction in which it is better)
METRICS = {
    "accuracy": ("accuracy", 1),
    "auc": ("AUC", 1),
    "f1": ("macro F1", 1),
    "balanced_accuracy": ("bal. acc.", 1),
    "loss": ("cross-entropy", -1),
    "entropy": ("entropy", 0),
    "normalized_entropy": ("H/log N", 0),
    "effective_number": ("effective N", 0),
    "instance_auc": ("inst. AUC", 1),
    "coverage": ("coverage", 1),
    "key_mass": ("key mass", 0),
    "train_loss": ("train. loss", -1),
    "lowest_entropy": ("lowest H/log N", 0),
    "final_entropy": ("final H/log N", 0),
    "collapsed": ("collapsed heads", -1),
    "overloaded": ("uniform heads", 0),
    "diverged": ("diverged", -1),
    "trained_parameters": ("trained", 0),
    "old_loss": ("old-task loss", -1),
    "forgetting": ("old-task increase", -1),
    "old_recall_at_1": ("old-task R@1", 1),
    "old_perplexity": ("old-task perplexity", -1),
    "perplexity": ("perplexity", -1),
    "forgetting_at_equal_loss": ("increase at equal loss", -1),
    "equal_loss": ("that loss", 0),
    "gt_known": ("GT-known", 1),
    "top1_loc": ("Top-1 loc.", 1),
    "max_box_v2": ("MaxBoxAccV2", 1),
    "pxap": ("PxAP", 1),
    "miou": ("mIoU", 1),
    "cam/gt_known": ("CAM", 1),
    "cam_mean/gt_known": ("CAM mean", 1),
    "bas/gt_known": ("BAS", 1),
    "bas_mean/gt_known": ("BAS mean", 1),
    "centre_gaussian/gt_known": ("centre Gaussian", 1),
    "accuracy_over_random": ("over random", 1),
    "adapted_layers": ("adapted layers", 0),
    "delta_cka": ("Delta-CKA", 0),
}
MAIN_METRICS = tuple(m for m in METRICS if m not in ("balanced_accuracy", "normalized_entropy", "key_mass"))


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 2 else 3
    return f"{value:.{digits}f}"


def _signed(value: float) -> str:
    number = _number(abs(value))
    return ("-" if value < 0 else "+") + (number[1:] if number.startswith("0.") else number)


def joint_table(comparisons: Mapping[str, Comparison], metrics: Sequence[str] | None = None, *, title: str = "") -> Any:
    """Several comparisons as one ``rich`` table: a section a comparison, a row a metric, a column a variant.

    With more than six variants rows and columns change places.

    Args:
        comparisons: heading of the section -> comparison; each is compared to its own baseline.
        metrics: which; ``None`` for the main ones.
        title: heading of the table.
    """
    from rich.table import Table

    names = list(dict.fromkeys(name for comparison in comparisons.values() for name in comparison.variants))
    chosen = MAIN_METRICS if metrics is None else metrics
    shown = [m for m in chosen if any(m in comparison.metrics for comparison in comparisons.values())]
    many = len(names) > _MANY
    table = Table(title=title, show_lines=True)
    table.add_column("")
    for name in map(_heading, shown) if many else names:
        table.add_column(name, justify="right")
    for heading, comparison in comparisons.items():
        if heading:
            table.add_row(f"[bold]{heading}[/bold]", *[""] * (len(shown) if many else len(names)))
        if many:
            for name in names:
                table.add_row(name, *[_cell(comparison.summary(name, metric)) for metric in shown])
            continue
        for metric in shown:
            if metric in comparison.metrics:
                table.add_row(_heading(metric), *[_cell(comparison.summary(name, metric)) for name in names])
    return table


def _heading(metric: str) -> str:
    return METRICS.get(metric, (metric, 0))[0]


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    first = f"{_number(summary.mean)}±{_number(summary.std)}"
    d = summary.difference
    if d is None:
        return first
    lines = [first, _signed(d.mean) + ("" if d.wins is None else f" {d.wins}/{d.pairs}")]
    if not math.isnan(d.low):
        lines.append(f"\\[{_signed(d.low)},{_signed(d.high)}]")
    return "\n".join(lines)


__all__ = ["MAIN_METRICS", "METRICS", "joint_table"]
