"""What a comparison found: a table, two files of numbers, two figures."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_entropy.recipes.comparison_figures import curve_figure, interval_figure
from lightning_entropy.recipes.comparison_table import MAIN_METRICS, METRICS, joint_table
from lightning_entropy.recipes.paired_statistics import PairedDifference, paired_difference
from lightning_entropy.training.figures import write_figure
from lightning_entropy.training.files import atomic_write


@dataclass(frozen=True)
class Summary:
    """One variant and one metric.

    Attributes:
        mean: over the runs.
        std: standard deviation over the runs, NaN with one run.
        runs: number of runs with a value.
        difference: to the baseline on the same folds and seeds; ``None`` for the baseline.
    """

    mean: float
    std: float
    runs: int
    difference: PairedDifference | None


def _json_safe(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Comparison:
    """Runs of several variants on the same folds and seeds.

    Args:
        recipe: name of the recipe.
        runs: the records, as their files hold them.
        variants: names in order; the first is the baseline.
        independent: whether runs have data of their own (a generator draws them), or overlapping splits of
            one set, whose intervals are widened as Nadeau and Bengio do.
    """

    recipe: str
    runs: list[dict[str, Any]]
    variants: list[str]
    independent: bool = False

    @property
    def baseline(self) -> str:
        """The variant that the others are compared to."""
        return self.variants[0]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that some run has a value for, the known ones first."""
        present = {k for run in self.runs for k, value in run["metrics"].items() if value is not None}
        return [m for m in METRICS if m in present] + sorted(present - METRICS.keys())

    @property
    def test_per_train(self) -> float:
        """n_test / n_train of overlapping splits; 0 for independent runs."""
        if self.independent:
            return 0.0
        ratios = [run["bags"]["test"] / run["bags"]["train"] for run in self.runs if run["bags"].get("train")]
        return math.fsum(ratios) / len(ratios) if ratios else 0.0

    def values(self, variant: str, metric: str) -> dict[tuple[int | None, int], float]:
        """Values of a variant by (fold, seed)."""
        return {
            (run["fold"], run["seed"]): run["metrics"][metric]
            for run in self.runs
            if run["variant"] == variant and run["metrics"].get(metric) is not None
        }

    def summary(self, variant: str, metric: str) -> Summary | None:
        """Mean, standard deviation and paired difference; ``None`` where no run has the metric."""
        values, baseline = self.values(variant, metric), self.values(self.baseline, metric)
        if not values:
            return None
        mean = math.fsum(values.values()) / len(values)
        squares = math.fsum((v - mean) ** 2 for v in values.values())
        std = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else math.nan
        pairs = [key for key in values if key in baseline]
        difference = None
        if variant != self.baseline and pairs:
            difference = paired_difference(
                [values[key] for key in pairs],
                [baseline[key] for key in pairs],
                better=METRICS.get(metric, ("", 0))[1],
                test_per_train=self.test_per_train,
            )
        return Summary(mean, std, len(values), difference)

    @property
    def method(self) -> str:
        """How the intervals were computed, in a sentence."""
        count = len(self.values(self.baseline, "auc")) or len(self.runs) // max(len(self.variants), 1)
        how = (
            "Student t over independent draws of data and initial weights"
            if self.independent
            else "Student t with the correction of Nadeau and Bengio for overlapping splits, "
            f"n_test/n_train = {self.test_per_train:.2f}"
        )
        return (
            f"Mean and standard deviation over {count} runs; below, difference to {self.baseline!r} on the same "
            f"data and initial weights with its 95 % interval, and in how many pairs it is better. {how}."
        )

    def table(self, metrics: Sequence[str] | None = None, *, title: str | None = None) -> Any:
        """The comparison as a ``rich`` table: a row a metric, a column a variant.

        Args:
            metrics: which; ``None`` for the main ones (the files have all).
            title: heading; ``None`` for the recipe's name.
        """
        table = joint_table({"": self}, metrics, title=title or self.recipe)
        table.caption = self.method
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=max(80, 20 + 16 * len(self.variants))).print(self.table())
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Summaries as plain values."""
        found: dict[str, dict[str, Any]] = {}
        for variant in self.variants:
            found[variant] = {}
            for metric in self.metrics:
                summary = self.summary(variant, metric)
                if summary is None:
                    continue
                entry: dict[str, Any] = {
                    "mean": summary.mean,
                    "std": _json_safe(summary.std),
                    "runs": summary.runs,
                }
                if summary.difference is not None:
                    d = summary.difference
                    entry |= {
                        "difference": d.mean,
                        "low": _json_safe(d.low),
                        "high": _json_safe(d.high),
                        "wins": d.wins,
                        "pairs": d.pairs,
                    }
                found[variant][metric] = entry
        return {
            "recipe": self.recipe,
            "baseline": self.baseline,
            "method": self.method,
            "test_per_train": self.test_per_train,
            "summary": found,
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Summaries and runs as JSON text, also written to ``path`` when it is given."""
        runs = [{k: v for k, v in run.items() if k != "curves"} for run in self.runs]
        text = json.dumps({**self.to_dict(), "runs": runs}, indent=1, allow_nan=False)
        if path is not None:
            with atomic_write(path) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        return text

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line a run: variant, fold, seed, metrics, seconds."""
        with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["variant", "fold", "seed", *self.metrics, "best_epoch", "seconds"])
            for run in self.runs:
                numbers = [run["metrics"].get(metric) for metric in self.metrics]
                row = [run["variant"], run["fold"], run["seed"], *numbers, run["best_epoch"], run["seconds"]]
                writer.writerow(["" if value is None else value for value in row])

    def plot(self, metrics: Sequence[str] | None = None) -> Any:
        """Paired differences with their intervals, a panel a metric, as a matplotlib figure."""
        wanted = [m for m in (metrics or self.metrics) if m in self.metrics]
        panels = {}
        for metric in wanted:
            heading, better = METRICS.get(metric, (metric, 0))
            rows = []
            for variant in self.variants[1:]:
                summary = self.summary(variant, metric)
                if summary is not None and summary.difference is not None:
                    rows.append((variant, summary.difference))
            if rows:  # none where the baseline has no value of it
                panels[heading + {1: " (higher is better)", -1: " (lower is better)", 0: ""}[better]] = rows
        return interval_figure(panels, baseline=self.baseline)

    def plot_curves(self) -> Any:
        """Training curves of every variant, mean and standard deviation over the runs, as a matplotlib
        figure.
        """
        curves: dict[str, list[dict[str, list[float | None]]]] = {variant: [] for variant in self.variants}
        for run in self.runs:
            curves[run["variant"]].append(run["curves"])
        return curve_figure(curves)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``results.json``, ``results.csv``, ``intervals.png`` (with two variants or more),
        ``curves.png``.
        """
        place = Path(folder)
        self.to_json(place / "results.json")
        self.to_csv(place / "results.csv")
        write_figure(self.plot_curves(), place / "curves.png")
        if len(self.variants) > 1:
            # Of what is logged in parts (MAP/gt_known) only the known ones: a panel each.
            shown = [metric for metric in self.metrics if "/" not in metric or metric in METRICS]
            write_figure(self.plot(shown), place / "intervals.png")


__all__ = ["MAIN_METRICS", "METRICS", "Comparison", "Summary", "joint_table"]
