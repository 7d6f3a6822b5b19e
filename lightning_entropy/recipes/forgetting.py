"""What the kappatune recipes add to a comparison: what was forgotten, also where all have learned as much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_entropy.finetuning.forgetting_monitor import ForgettingMonitor
from lightning_entropy.recipes.comparison_figures import COLORS, MARKERS
from lightning_entropy.recipes.comparison_result import Comparison
from lightning_entropy.recipes.paired_statistics import mean_and_deviation
from lightning_entropy.training.forgetting_history import Reading, old_at
from lightning_entropy.training.lightning import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEW, SCORE = "val/loss", "val/accuracy"
OLD, INCREASE = "loss", "increase"  # of the old task
SCORES = ("recall_at_1", "perplexity", "accuracy")
_TASK = "old"


def observed(trainer: Trainer) -> dict[str, Any]:
    """What the ForgettingMonitor of a run has read.

    Args:
        trainer: after its fit.

    Returns:
        ``readings``, as :attr:`~lightning_entropy.ForgettingMonitor.history` has them, None where a number is not
        finite; empty without a monitor.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    monitor = next((callback for callback in callbacks if isinstance(callback, ForgettingMonitor)), None)
    return {"readings": [] if monitor is None else _finite(monitor.history)}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def readings(record: Mapping[str, Any]) -> list[Reading]:
    """A run's readings; what its validation before training gave belongs to the first.

    Args:
        record: of a run, with ``readings``, and ``before`` where it was validated before training.
    """
    found: list[Reading] = []
    for reading in record.get("readings", ()):
        new = record.get("before", {}) if reading["when"] == "before" else reading["new"]
        old = {name: value for name, value in reading["old"].get(_TASK, {}).items() if value is not None}
        found.append({**reading, "old": {_TASK: old}, "new": {k: v for k, v in new.items() if v is not None}})
    return found


def summarize(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers of a run from what was logged in it.

    Args:
        record: with ``readings`` and ``trained_parameters``.

    Returns:
        ``trained_parameters``; ``old_loss``, of the old task at the end, and ``forgetting``, its increase since before
        training, both in nats; ``old_recall_at_1`` (or ``old_perplexity``, ``old_accuracy``), at the end.
    """
    known = readings(record)
    last: Mapping[str, float] = known[-1]["old"][_TASK] if known else {}
    first: Mapping[str, float] = known[0]["old"][_TASK] if known else {}
    return {
        "trained_parameters": record.get("trained_parameters"),
        "old_loss_before": first.get(OLD),
        "old_loss": last.get(OLD),
        "forgetting": last.get(INCREASE),
        **{f"old_{name}": last[name] for name in SCORES if name in last},
    }


def common_levels(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[int | None, int], float]:
    """The lowest validation loss that every variant has reached, by fold and seed.

    Args:
        runs: records of a comparison.
    """
    lowest: dict[tuple[int | None, int], list[float]] = {}
    for run in runs:
        reached = [reading["new"][NEW] for reading in readings(run) if NEW in reading["new"]]
        lowest.setdefault((run["fold"], run["seed"]), []).append(min(reached, default=math.inf))
    return {key: max(values) for key, values in lowest.items()}


def across(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
    """Numbers of every run that need the others: variants compared where they have learned as much.

    Args:
        runs: records of a comparison.

    Returns:
        For each, ``forgetting_at_equal_loss``: the increase of the old task's loss where the run's validation loss
        first reaches the level that every variant of its fold and seed reaches (:func:`common_levels`), interpolated
        between readings; None where there is no such level. ``equal_loss``: that level.
    """
    levels = common_levels(runs)
    found: list[dict[str, float | None]] = []
    for run in runs:
        level = levels[run["fold"], run["seed"]]
        exists = math.isfinite(level)
        value = old_at(readings(run), new_task=NEW, level=level, task=_TASK, quantity=INCREASE) if exists else None
        found.append({"forgetting_at_equal_loss": value, "equal_loss": level if exists else None})
    return found


def numbers(comparison: Comparison) -> dict[str, Any]:
    """What :func:`draw` draws.

    Returns:
        variant -> ``path``, over the readings: ``step``, and mean and standard deviation over the runs of validation
        loss, validation accuracy, and the old task's loss and its increase; ``final``: test accuracy (or perplexity),
        forgetting, forgetting at equal loss.
    """
    found: dict[str, Any] = {}
    for variant in comparison.variants:
        runs = [run for run in comparison.runs if run["variant"] == variant]
        known = [{reading["step"]: reading for reading in readings(run)} for run in runs]
        steps = sorted({step for run in known for step in run})
        columns = {
            NEW: lambda reading: reading["new"].get(NEW),
            SCORE: lambda reading: reading["new"].get(SCORE),
            OLD: lambda reading: reading["old"][_TASK].get(OLD),
            INCREASE: lambda reading: reading["old"][_TASK].get(INCREASE),
        }
        path = {
            name: [mean_and_deviation([column(run[step]) for run in known if step in run]) for step in steps]
            for name, column in columns.items()
        }
        names = ("accuracy", "perplexity", "loss", "forgetting", "forgetting_at_equal_loss", "trained_parameters")
        final = {name: mean_and_deviation(list(comparison.values(variant, name).values())) for name in names}
        found[variant] = {"runs": len(runs), "path": {"step": steps, **path}, "final": final}
    return found


def _points(cells: Sequence[Mapping[str, Any]], key: str = "mean") -> np.ndarray:
    return np.array([np.nan if cell[key] is None else cell[key] for cell in cells], dtype=float)


def draw(comparison: Comparison) -> Figure:
    """The trade-off: what was learned against what was forgotten.

    Left the paths of the variants in training, means over the runs: right is better at the new task, down has forgotten
    less. In the middle the ends of the runs, with standard deviations. Right what was forgotten where all have the same
    validation loss.
    """
    from matplotlib.figure import Figure

    shown = numbers(comparison)
    figure = Figure(figsize=(14.5, 5.4), layout="constrained")
    score = "accuracy" if "accuracy" in comparison.metrics else "perplexity"
    path, end, equal = figure.subplots(1, 3, width_ratios=(1.3, 1.1, 1.0))
    for number, (variant, kept) in enumerate(shown.items()):
        look: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        x, y = _points(kept["path"][NEW]), _points(kept["path"][INCREASE])
        path.plot(x, y, label=variant, linewidth=1.4, markersize=4.5, **look)
        final = kept["final"]
        ends = {name: [_points([final[name]], key)[0] for key in ("mean", "std")] for name in (score, "forgetting")}
        (x_end, x_std), (y_end, y_std) = ends[score], ends["forgetting"]
        end.errorbar(x_end, y_end, xerr=_bar(x_std), yerr=_bar(y_std), markersize=6, linestyle="", capsize=2, **look)
        mean, std = (_points([final["forgetting_at_equal_loss"]], key)[0] for key in ("mean", "std"))
        equal.errorbar(mean, number, xerr=_bar(std), markersize=6, linestyle="", capsize=2, **look)
    path.invert_xaxis()
    path.set_xlabel("new task: validation cross-entropy (right is better)", fontsize=9)
    path.set_ylabel("old task: increase of its loss, nats (down is better)", fontsize=9)
    path.set_title("in training, mean over runs", fontsize=10)
    end.set_xlabel(f"new task: test {score}", fontsize=9)
    end.set_ylabel("old task: increase of its loss, nats", fontsize=9)
    end.set_title("at the end, mean and standard deviation", fontsize=10)
    equal.set_yticks(range(len(shown)), list(shown))
    equal.set_ylim(len(shown) - 0.5, -0.5)
    equal.set_xlabel("old task: increase of its loss, nats", fontsize=9)
    equal.set_title(f"at equal validation loss ({_level(comparison)})", fontsize=10)
    for axis in (path, end, equal):
        axis.grid(alpha=0.25, linewidth=0.6)
    handles, labels = path.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    return figure


def _bar(std: float) -> float | None:
    return float(std) if math.isfinite(std) else None


def _level(comparison: Comparison) -> str:
    levels = [level for level in common_levels(comparison.runs).values() if math.isfinite(level)]
    return f"{np.mean(levels):.3f} on average" if levels else "none in common"


__all__ = ["across", "common_levels", "draw", "numbers", "observed", "readings", "summarize"]
