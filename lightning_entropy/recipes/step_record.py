"""A logger that keeps in memory what a run logs, step by step."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, TypedDict

from lightning_entropy.training.lightning import Logger


class Steps(TypedDict):
    """The values of one name.

    Keys:
        step: numbers of the optimizer steps, from 0.
        value: the value logged there; None where it was not finite.
    """

    step: list[int]
    value: list[float | None]


class StepRecord(Logger):
    """Keeps the values of the names that match; ``values[name]`` has one entry for each logged step.

    Args:
        patterns: shell patterns over logged names.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        super().__init__()
        self.patterns = list(patterns)
        self.values: dict[str, Steps] = {}

    @property
    def name(self) -> str:
        """What Lightning calls it."""
        return "steps"

    @property
    def version(self) -> int:
        """There is one a run."""
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep what matches."""
        for name, value in metrics.items():
            if any(fnmatchcase(name, pattern) for pattern in self.patterns):
                kept = self.values.setdefault(name, Steps(step=[], value=[]))
                kept["step"].append(-1 if step is None else int(step))
                kept["value"].append(float(value) if math.isfinite(value) else None)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run's file has the configuration already."""


__all__ = ["StepRecord", "Steps"]
