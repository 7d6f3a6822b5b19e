"""What a run has forgotten, reading by reading: kept in memory, in checkpoints and in a JSON file."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_entropy.training.files import atomic_write

Reading = dict[str, Any]
"""``step``, ``epoch``, ``when`` ("before", "step", "validation" or "epoch"), ``old``: task -> name -> value, ``new``:
name -> value of what was logged then."""


class ForgettingHistory:
    """Readings in the order of their steps, at most ``most`` of them: beyond that every second one is dropped.

    The first and the last always stay.

    Args:
        most: how many readings are kept.
    """

    def __init__(self, most: int = 1000) -> None:
        if most < 4:
            raise ValueError(f"most must be at least 4, got {most}")
        self.most = most
        self.readings: list[Reading] = []

    def __len__(self) -> int:
        return len(self.readings)

    @property
    def last(self) -> Reading | None:
        """The last reading."""
        return self.readings[-1] if self.readings else None

    def add(self, *, step: int, epoch: int, when: str, old: Mapping[str, Mapping[str, float]]) -> Reading:
        """Keep a reading; one of the same step is replaced. A task's ``loss`` gets its ``increase`` since the first."""
        if self.readings and self.readings[-1]["step"] == step:
            self.readings.pop()
        first = self.readings[0]["old"] if self.readings else old
        known = {task: dict(values) for task, values in old.items()}
        for task, values in known.items():
            before = first.get(task, {}).get("loss")
            if "loss" in values and before is not None:
                values["increase"] = values["loss"] - before
        reading: Reading = {"step": step, "epoch": epoch, "when": when, "old": known, "new": {}}
        self.readings.append(reading)
        if len(self.readings) > self.most:
            self.readings = [*self.readings[:-1:2], self.readings[-1]]
        return reading

    def write(self, path: Path, **about: Any) -> None:
        """Write the file, whole or not at all. Numbers that are not finite become null.

        Args:
            path: of the file.
            about: further entries of the file.
        """
        text = json.dumps(_finite({**about, "readings": self.readings}), indent=1, allow_nan=False)
        with atomic_write(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def state_dict(self) -> list[Reading]:
        """Plain values."""
        return [_copy(reading) for reading in self.readings]

    def load_state_dict(self, state: Iterable[Reading]) -> None:
        """Go on where a checkpoint was."""
        self.readings = [_copy(reading) for reading in state]


def _copy(reading: Reading) -> Reading:
    old = {task: dict(values) for task, values in reading["old"].items()}
    return {**reading, "old": old, "new": dict(reading["new"])}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choose_new_task(names: Sequence[str]) -> str | None:
    """Of logged names the one that looks most like the score of the task that is trained.

    A score of validation before a loss of validation, that before a score or loss of training.
    """

    def rank(name: str) -> tuple[bool, bool]:
        low = name.lower()
        return ("val" not in low and "eval" not in low, "loss" in low)

    usable = [name for name in names if name not in ("epoch", "step") and not name.startswith("lr")]
    return min(usable, key=rank) if usable else None


def points(
    readings: Sequence[Reading], *, new_task: str, task: str | None = None, quantity: str = "loss"
) -> list[tuple[int, float, float]]:
    """``(step, old-task value, new-task value)`` of the readings that have both, finite.

    Args:
        readings: a run's history.
        new_task: name of the new task's score.
        task: name of the old task; None: the first.
        quantity: of the old task, ``"loss"``, ``"increase"``, or what its metric gives.
    """
    found = []
    for reading in readings:
        tasks = reading["old"]
        values = tasks.get(next(iter(tasks), "") if task is None else task, {})
        old, new = values.get(quantity), reading["new"].get(new_task)
        if old is not None and new is not None and math.isfinite(old) and math.isfinite(new):
            found.append((reading["step"], old, new))
    return found


def old_at(
    readings: Sequence[Reading], *, new_task: str, level: float, task: str | None = None, quantity: str = "loss"
) -> float | None:
    """The old task's value where the new task's score first reaches a level: methods compared at equal new-task score.

    Between readings both are interpolated linearly.

    Args:
        readings: a run's history.
        new_task: name of the new task's score.
        level: of that score; from above or from below.
        task: name of the old task; None: the first.
        quantity: of the old task.

    Returns:
        The value; None if no reading reaches the level.

    Example:
        >>> run = ForgettingHistory()
        >>> for step, loss, score in ((10, 1.0, 0.5), (20, 2.0, 0.7)):
        ...     run.add(step=step, epoch=0, when="step", old={"old": {"loss": loss}})["new"]["val_accuracy"] = score
        >>> round(old_at(run.readings, new_task="val_accuracy", level=0.6), 6)
        1.5
    """
    known = points(readings, new_task=new_task, task=task, quantity=quantity)
    if known and known[0][2] == level:
        return known[0][1]
    for (_, old, new), (_, next_old, next_new) in itertools.pairwise(known):
        if (new - level) * (next_new - level) <= 0 and new != next_new:
            return old + (next_old - old) * (level - new) / (next_new - new)
    return None


__all__ = ["ForgettingHistory", "Reading", "choose_new_task", "old_at", "points"]
