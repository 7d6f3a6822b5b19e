"""What the recipe inflection-text adds to a comparison: the adapted layers, and what training changed in each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_entropy.recipes.catalog import find_recipe
from lightning_entropy.recipes.comparison_figures import COLORS, MARKERS
from lightning_entropy.recipes.comparison_result import Comparison
from lightning_entropy.recipes.layer_change import LayerChange
from lightning_entropy.recipes.paired_statistics import mean_and_deviation, paired_difference
from lightning_entropy.recipes.variants import read_yaml
from lightning_entropy.training.fine_tuning import FineTuningCallback
from lightning_entropy.training.lightning import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROL, BASELINE, TESTED = "random", "full", "inflection"  # arms
PROFILE = ("entropy", "gradient", "relative_gradient")
Key = tuple[str, "int | None", int]  # regime, fold, seed


def observed(trainer: Trainer) -> dict[str, Any]:
    """What a run knows of its layers.

    Args:
        trainer: after its fit, with a :class:`~lightning_entropy.recipes.LayerChange` among its callbacks.

    Returns:
        ``layers``: the diagnoses before and after; ``adapted``: the layers in which a callback chose weights, None
        where there is no such callback; ``source``: the source task and its last loss and accuracy.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    change = next((callback for callback in callbacks if isinstance(callback, LayerChange)), None)
    tuning = next((callback for callback in callbacks if isinstance(callback, FineTuningCallback)), None)
    names = [] if change is None or change.before is None else change.before.layers
    adapted = None
    if tuning is not None and tuning.chosen is not None:
        chosen = tuning.chosen.selection.names
        adapted = [layer for layer in names if any(f"{name}.".startswith(f"{layer}.") for name in chosen)]
    source = getattr(trainer.lightning_module, "source_record", None)
    return {
        "layers": {} if change is None else change.record(),
        "adapted": adapted,
        "source": {} if source is None else source(),
    }


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _log_mean(values: Sequence[float | None]) -> float | None:
    positive = [math.log(value) for value in _known(values) if value > 0]
    return math.exp(math.fsum(positive) / len(positive)) if positive else None


def summarize(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers of a run from what was seen of its layers.

    Args:
        record: with ``layers``, ``adapted``, ``source``, ``before`` and ``trained_parameters``.

    Returns:
        ``trained_parameters``; ``adapted_layers``, how many; ``delta_cka``, mean over the layers of 1 - CKA between the
        ends of training; ``gradient_before``, geometric mean over the layers of the activation gradient before
        training, and ``relative_gradient_before``, the same divided by the output error; ``entropy_before``, mean
        attention entropy; ``accuracy_before``, of validation; ``source_loss``. None for what is not known.
    """
    layers: Mapping[str, Any] = record.get("layers", {})
    before, after = layers.get("before", {}), layers.get("after", {})
    change, entropy = _known(after.get("delta_cka", [])), _known(before.get("entropy", []))
    adapted = record.get("adapted")
    return {
        "trained_parameters": record.get("trained_parameters"),
        "adapted_layers": None if adapted is None else len(adapted),
        "delta_cka": float(np.mean(change)) if change else None,
        "gradient_before": _log_mean(before.get("gradient", [])),
        "relative_gradient_before": _log_mean(before.get("relative_gradient", [])),
        "entropy_before": float(np.mean(entropy)) if entropy else None,
        "accuracy_before": record.get("before", {}).get("val/accuracy"),
        "source_loss": record.get("source", {}).get("loss"),
    }


def parts_of(variant: str) -> tuple[str, str]:
    """The regime and the arm of a variant's name, whichever was varied first; the regime is empty where none was.

    Example:
        >>> parts_of("over, inflection"), parts_of("inflection"), parts_of("lr=1, top")
        (('over', 'inflection'), ('', 'inflection'), ('lr=1', 'top'))
    """
    arms = {str(name) for name in read_yaml(find_recipe("inflection-text").variants_path)["arm"]}
    parts = variant.split(", ")
    arm = next((part for part in parts if part in arms), parts[-1])
    rest = list(parts)
    rest.remove(arm)
    return ", ".join(rest), arm


def _key(run: Mapping[str, Any]) -> Key:
    return parts_of(run["variant"])[0], run["fold"], run["seed"]


def across(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
    """Numbers of every run that need the others.

    Args:
        runs: records of a comparison.

    Returns:
        For each ``accuracy_over_random``: its test accuracy minus that of the random layers in the same regime, fold
        and seed; None where there is no such run.
    """
    control = {_key(run): run["metrics"].get("accuracy") for run in runs if parts_of(run["variant"])[1] == CONTROL}
    found: list[dict[str, float | None]] = []
    for run in runs:
        own, other = run["metrics"].get("accuracy"), control.get(_key(run))
        found.append({"accuracy_over_random": None if own is None or other is None else own - other})
    return found


def _difference(comparison: Comparison, variant: str, other: str) -> dict[str, Any] | None:
    own, base = comparison.values(variant, "accuracy"), comparison.values(other, "accuracy")
    pairs = [key for key in own if key in base]
    if variant == other or not pairs:
        return None
    found = paired_difference(
        [own[key] for key in pairs], [base[key] for key in pairs], test_per_train=comparison.test_per_train
    )
    ends = {"low": found.low, "high": found.high}
    safe = {name: value if math.isfinite(value) else None for name, value in ends.items()}
    return {"mean": found.mean, **safe, "wins": found.wins, "pairs": found.pairs}


def numbers(comparison: Comparison) -> dict[str, Any]:
    """What :func:`draw` draws.

    Returns:
        regime -> ``layers``, their names; ``before``, attention entropy and gradients of each before training, mean and
        standard deviation over the seeds; ``arms``: arm -> test accuracy (each run, mean, standard deviation), paired
        differences within the regime to the ``random`` and to the ``full`` arm with their 95 % intervals, trained
        numbers, Delta-CKA of each layer, the share of the variance in its basis, and in how many runs a layer was
        adapted.
    """
    regimes: dict[str, dict[str, str]] = {}
    for variant in comparison.variants:
        regime, arm = parts_of(variant)
        regimes.setdefault(regime, {})[arm] = variant
    return {regime: _of_regime(comparison, arms) for regime, arms in regimes.items()}


def _of_regime(comparison: Comparison, arms: Mapping[str, str]) -> dict[str, Any]:
    runs = {arm: [r for r in comparison.runs if r["variant"] == variant] for arm, variant in arms.items()}
    every = [run for members in runs.values() for run in members]
    layers: list[str] = next((r["layers"]["before"]["layer"] for r in every if r.get("layers")), [])
    starts: dict[tuple[Any, Any], Any] = {}  # every arm of a seed starts from the same weights
    for run in every:
        if run.get("layers"):
            starts.setdefault((run["fold"], run["seed"]), run["layers"]["before"])
    before = {
        name: [mean_and_deviation([start[name][i] for start in starts.values()]) for i in range(len(layers))]
        for name in PROFILE
    }
    found: dict[str, Any] = {}
    for arm, variant in arms.items():
        accuracy = comparison.values(variant, "accuracy")
        ends = [run["layers"]["after"] for run in runs[arm] if run.get("layers", {}).get("after")]
        adapted = [run["adapted"] for run in runs[arm] if run.get("adapted") is not None]
        found[arm] = {
            "accuracy": {**mean_and_deviation(list(accuracy.values())), "each": list(accuracy.values())},
            **{
                f"over_{other}": _difference(comparison, variant, arms[other])
                for other in (CONTROL, BASELINE)
                if other in arms
            },
            "trained_parameters": mean_and_deviation(list(comparison.values(variant, "trained_parameters").values())),
            "delta_cka": [mean_and_deviation([end["delta_cka"][i] for end in ends]) for i in range(len(layers))],
            "retained_variance": mean_and_deviation([value for end in ends for value in end["retained_variance"]]),
            "adapted": {layer: sum(layer in names for names in adapted) for layer in layers} if adapted else None,
        }
    return {"layers": layers, "before": before, "arms": found}


def _points(cells: Sequence[Mapping[str, Any]], key: str = "mean") -> np.ndarray:
    return np.array([np.nan if cell[key] is None else cell[key] for cell in cells], dtype=float)


def draw(comparison: Comparison) -> Figure:
    """A row a regime: the layers before training, Delta-CKA of the arms, and their test accuracies.

    Left attention entropy and the activation gradient over depth, with how often the inflection arm chose a layer as
    bars. In the middle how much training changed each layer, in the shared basis. Right the accuracies: a small point a
    seed, the mean, and its standard deviation.
    """
    from matplotlib.figure import Figure

    shown = numbers(comparison)
    figure = Figure(figsize=(14.5, 0.8 + 4.0 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 3, squeeze=False, width_ratios=(1.1, 1.2, 1.0))
    for (profile, change, accuracy), (regime, kept) in zip(axes, shown.items()):
        name = f"{regime}: " if regime else ""
        _draw_profile(profile, kept)
        profile.set_title(f"{name}before target training", fontsize=10)
        change.set_title(f"{name}change of each layer in target training", fontsize=10)
        accuracy.set_title(f"{name}target task", fontsize=10)
        for number, (arm, cells) in enumerate(kept["arms"].items()):
            look: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
            depth = np.arange(len(kept["layers"]))
            change.plot(depth, _points(cells["delta_cka"]), label=arm, linewidth=1.4, markersize=5, **look)
            each = [value for value in cells["accuracy"]["each"] if value is not None]
            accuracy.plot(each, [number + 0.16] * len(each), linestyle="", markersize=3, alpha=0.5, **look)
            mean, std = (_points([cells["accuracy"]], key)[0] for key in ("mean", "std"))
            bar = float(std) if math.isfinite(std) else None
            accuracy.errorbar(mean, number, xerr=bar, markersize=7, linestyle="", capsize=2, **look)
        change.set_xlabel("layer", fontsize=9)
        change.set_ylabel("Delta-CKA, 1 - CKA in one PCA basis", fontsize=9)
        change.set_xticks(range(len(kept["layers"])))
        accuracy.set_yticks(range(len(kept["arms"])), list(kept["arms"]))
        accuracy.set_ylim(len(kept["arms"]) - 0.5, -0.5)
        accuracy.set_xlabel("test accuracy", fontsize=9)
        for axis in (profile, change, accuracy):
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.tick_params(labelsize=8)
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(len(labels), 8)), frameon=False)
    return figure


def _draw_profile(axis: Any, kept: Mapping[str, Any]) -> None:
    depth = np.arange(len(kept["layers"]))
    adapted = kept["arms"].get(TESTED, {}).get("adapted")
    if adapted:
        most = max(kept["arms"][TESTED]["accuracy"]["runs"], 1)
        share = [count / most for count in adapted.values()]
        axis.bar(depth, share, width=0.9, color="#f2c879", alpha=0.45, zorder=0, label="chosen, share of runs")
    entropy = _points(kept["before"]["entropy"])
    axis.plot(depth, entropy, "o-", color=COLORS[1], markersize=5, linewidth=1.4, label="attention entropy")
    axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel("attention entropy / log(keys)", fontsize=9)
    axis.set_xlabel("layer", fontsize=9)
    axis.set_xticks(range(len(depth)))
    other = axis.twinx()
    for name, label, style in (
        ("gradient", "activation gradient", "s-"),
        ("relative_gradient", "the same / output error", "s:"),
    ):
        values = _points(kept["before"][name])
        if np.isfinite(values).any() and np.nanmax(values) > 0:
            other.plot(depth, values, style, color=COLORS[2], markersize=4, linewidth=1.2, label=label)
            other.set_yscale("log")
    other.set_ylabel("gradient norm", fontsize=9)
    other.tick_params(labelsize=8)
    handles, labels = axis.get_legend_handles_labels()
    more, names = other.get_legend_handles_labels()
    axis.legend(handles + more, labels + names, fontsize=7, loc="best", framealpha=0.8)


__all__ = ["across", "draw", "numbers", "observed", "parts_of", "summarize"]
