"""Figures of forgetting: the new task's score against the old task's loss, and the old task over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_entropy.training.forgetting_history import Reading, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = Sequence[Reading]
_LEGIBLE = 12  # entries of a legend


def plot_tradeoff(
    runs: Mapping[str, Run | Sequence[Run]], *, new_task: str, task: str | None = None, quantity: str = "loss"
) -> Figure:
    """New-task score against old-task value, a line a run, a colour a method: equal scores can be read off across.

    Args:
        runs: name -> a run's history (``ForgettingMonitor.history``), or several, as of several seeds.
        new_task: name of the new task's score.
        task: name of the old task; None: the first.
        quantity: of the old task, ``"loss"``, ``"increase"``, or what its metric gives.

    Returns:
        The figure. A dot is a reading, a ring the last of a run, a dotted line the old task before training.

    Raises:
        ValueError: if no run has both values.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    drawn = 0
    for number, (name, given) in enumerate(runs.items()):
        several: Sequence[Run] = [given] if not given or isinstance(given[0], Mapping) else given  # type: ignore[list-item,assignment]
        label: str | None = name
        for run in several:
            if _draw_tradeoff(axes, run, new_task, task, quantity, f"C{number % 10}", label):
                label = None
                drawn += 1
    if not drawn:
        raise ValueError(
            f"no reading has both {quantity!r} of the old task and {new_task!r} of the new one; logged were "
            f"{', '.join(_logged(runs)) or 'none'}"
        )
    _finish_tradeoff(axes, new_task, task, quantity, entries=len(runs))
    return figure


def plot_forgetting(readings: Run, *, new_task: str | None, quantity: str = "loss") -> Figure:
    """One run: its trade-off, where the new task's score is known, and the old tasks over the steps.

    Args:
        readings: the run's history.
        new_task: name of the new task's score; None draws the old tasks alone.
        quantity: of the old tasks; one that has it not is drawn by its first value.

    Raises:
        ValueError: if nothing was read.
    """
    from matplotlib.figure import Figure

    if not readings:
        raise ValueError("nothing was read yet: there is nothing to draw")
    tasks = list(readings[-1]["old"])
    shown = {
        task: quantity if quantity in values else next(iter(values)) for task, values in readings[-1]["old"].items()
    }
    known = [
        t for t in tasks if new_task is not None and points(readings, new_task=new_task, task=t, quantity=shown[t])
    ]
    figure = Figure(figsize=(9.5 if known else 5.5, 3.8), layout="constrained")
    places = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    if new_task is not None and known:
        for number, task in enumerate(known):
            _draw_tradeoff(places[0], readings, new_task, task, shown[task], f"C{number % 10}", task)
        _finish_tradeoff(
            places[0], new_task, known[0] if len(known) == 1 else None, shown[known[0]], entries=len(known)
        )
    for number, task in enumerate(tasks):
        steps = [reading["step"] for reading in readings]
        values = [reading["old"].get(task, {}).get(shown[task], float("nan")) for reading in readings]
        places[-1].plot(steps, values, marker=".", color=f"C{number % 10}", label=f"{task}: {shown[task]}")
    places[-1].set_xlabel("optimizer step")
    places[-1].set_ylabel(f"old task: {shown[tasks[0]]}" if len(set(shown.values())) == 1 else "old tasks")
    if 1 < len(tasks) <= _LEGIBLE:
        places[-1].legend(fontsize="small")
    return figure


def _draw_tradeoff(
    axes: Axes, run: Run, new_task: str, task: str | None, quantity: str, color: str, label: str | None
) -> bool:
    known = points(run, new_task=new_task, task=task, quantity=quantity)
    if not known:
        return False
    old, new = [point[1] for point in known], [point[2] for point in known]
    axes.plot(old, new, marker=".", linewidth=1, color=color, label=label)
    axes.plot(old[-1:], new[-1:], marker="o", markersize=8, fillstyle="none", color=color, linestyle="")
    first = run[0]
    values = first["old"].get(next(iter(first["old"])) if task is None else task, {})
    if first["when"] == "before" and quantity in values:
        axes.axvline(values[quantity], color=color, linestyle=":", linewidth=0.8)
    return True


def _finish_tradeoff(axes: Axes, new_task: str, task: str | None, quantity: str, *, entries: int) -> None:
    axes.set_xlabel(f"old task{'' if task in (None, 'old') else f' ({task})'}: {quantity}")
    axes.set_ylabel(f"new task: {new_task}")
    if 1 < entries <= _LEGIBLE:
        axes.legend(fontsize="small")


def _logged(runs: Mapping[str, Run | Sequence[Run]]) -> list[str]:
    names: dict[str, None] = {}
    for given in runs.values():
        for run in [given] if not given or isinstance(given[0], Mapping) else given:
            for reading in run:
                names.update(dict.fromkeys(reading["new"]))  # type: ignore[call-overload,index]
    return list(names)


__all__ = ["plot_forgetting", "plot_tradeoff"]
