"""What the wsol recipes add to a comparison: the maps of every variant, by every score.

A variant has several maps, and which of them is the best one differs. The scores that are named without a map are
those of the learned map with the highest MaxBoxAccV2 on the validation images: the choice of someone who has boxes
there, and none of the test images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_entropy.recipes.comparison_figures import COLORS, MARKERS
from lightning_entropy.recipes.comparison_result import Comparison
from lightning_entropy.recipes.localization_maps import FIXED
from lightning_entropy.recipes.paired_statistics import mean_and_deviation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHOSEN_BY = "max_box_v2"
SEGMENTATION = "miou"
TITLES = {
    "gt_known": "GT-known",
    "top1_loc": "Top-1 localization",
    "max_box_v2": "MaxBoxAccV2",
    "pxap": "PxAP",
    SEGMENTATION: "mIoU, image labels known",
}


def maps_of(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the maps that a run was tested with."""
    parts = [name.partition("/") for name in metrics]
    return list(dict.fromkeys(name for name, _, score in parts if score in TITLES))


def chosen_map(record: Mapping[str, Any]) -> str | None:
    """The learned map with the best score on the validation images in the last epoch; None where none was judged.

    Args:
        record: of a run, with ``curves`` and ``metrics``.
    """
    found: dict[str, float] = {}
    for name in maps_of(record["metrics"]):
        for score in (CHOSEN_BY, SEGMENTATION):
            curve = record["curves"].get(f"val/{name}/{score}") or [None]
            if name not in FIXED and curve[-1] is not None:
                found[name] = curve[-1]
    return max(found, key=lambda name: found[name]) if found else None


def summarize(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers of a run from what was logged in it.

    Args:
        record: with ``metrics`` of the test and ``curves``, as
            :func:`~lightning_entropy.recipes.run_record.train_and_test` makes it.

    Returns:
        ``gt_known``, ``top1_loc``, ``max_box_v2``, ``pxap`` (or ``miou``) of the map that was chosen on the validation
        images.
    """
    chosen = chosen_map(record)
    kept = {score: record["metrics"].get(f"{chosen}/{score}") for score in TITLES} if chosen else {}
    return {score: value for score, value in kept.items() if value is not None}


def numbers(comparison: Comparison) -> dict[str, Any]:
    """What :func:`draw` draws.

    Returns:
        variant -> ``maps``: map -> score -> ``mean``, ``std`` and number of ``runs``; ``chosen``: how often each map
        was the one chosen on the validation images; ``accuracy`` likewise.
    """
    found: dict[str, Any] = {}
    for variant in comparison.variants:
        runs = [run for run in comparison.runs if run["variant"] == variant]
        names = dict.fromkeys(name for run in runs for name in maps_of(run["metrics"]))
        maps: dict[str, Any] = {}
        for name in names:
            scores = {score: list(comparison.values(variant, f"{name}/{score}").values()) for score in TITLES}
            maps[name] = {score: mean_and_deviation(values) for score, values in scores.items() if values}
        chosen = [chosen_map(run) for run in runs]
        found[variant] = {
            "runs": len(runs),
            "maps": maps,
            "chosen": {name: chosen.count(name) for name in dict.fromkeys(chosen) if name},
            "accuracy": mean_and_deviation(list(comparison.values(variant, "accuracy").values())),
        }
    return found


def draw(comparison: Comparison) -> Figure:
    """A panel a score, a row a map, a mark a variant: means over the runs with standard deviations."""
    from matplotlib.figure import Figure

    shown = numbers(comparison)
    names = list(dict.fromkeys(name for kept in shown.values() for name in kept["maps"]))
    scores = [s for s in TITLES if any(s in m for kept in shown.values() for m in kept["maps"].values())]
    count = max(len(scores), 1)
    figure = Figure(figsize=(1.6 + 3.3 * count, 1.6 + 0.5 * max(len(names), 1)), layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    step = 0.7 / max(len(shown), 1)
    for axis, score in zip(axes, scores):
        for number, (variant, kept) in enumerate(shown.items()):
            rows = [(place, kept["maps"][name][score]) for place, name in enumerate(names) if _has(kept, name, score)]
            places = [place + (number - (len(shown) - 1) / 2) * step for place, _ in rows]
            axis.errorbar(
                [cell["mean"] for _, cell in rows],
                places,
                xerr=[cell["std"] or 0.0 for _, cell in rows],
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle="",
                markersize=5,
                elinewidth=1,
                label=variant,
            )
        axis.set_title(TITLES[score], fontsize=10)
        axis.set_xlim(0, 1)
        axis.grid(alpha=0.25, linewidth=0.6)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(max(len(labels), 1), 6), frameon=False)
    return figure


def _has(kept: Mapping[str, Any], name: str, score: str) -> bool:
    return kept["maps"].get(name, {}).get(score, {}).get("mean") is not None


__all__ = ["TITLES", "chosen_map", "draw", "maps_of", "numbers", "summarize"]
