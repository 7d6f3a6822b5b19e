"""How much may be chosen: a count or fraction of tensors or of parameters, or a threshold on the score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("tensors", "parameters", "threshold")


@dataclass(frozen=True)
class BudgetRule:
    """A budget, checked.

    Args:
        kind: ``"tensors"``, ``"parameters"`` or ``"threshold"``.
        value: a count (int), a fraction in (0, 1] (float), or the threshold.
    """

    kind: str
    value: float

    @classmethod
    def of(cls, budget: Any, owner: str) -> BudgetRule:
        """Check a budget: an int counts tensors, a float is a fraction of them, a mapping names what it limits.

        Raises:
            ValueError: if it is none of these, naming what is taken.
        """
        kind, value = "tensors", budget
        if isinstance(budget, Mapping):
            if len(budget) != 1 or next(iter(budget)) not in KINDS:
                raise ValueError(f"{owner}: budget must have one of the keys {', '.join(KINDS)}, got {dict(budget)!r}")
            kind, value = next(iter(budget.items()))
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ValueError(
                f"{owner}: budget must be a count of tensors (int), a fraction of them (float in (0, 1]) or a mapping "
                f"such as {{'parameters': 0.1}} or {{'threshold': 30.0}}, got {budget!r}"
            )
        if kind != "threshold" and isinstance(value, float) and not 0 < value <= 1:
            raise ValueError(f"{owner}: a fraction of {kind} must be in (0, 1], got {value}; a count is an int")
        if kind != "threshold" and isinstance(value, int) and value < 1:
            raise ValueError(f"{owner}: a count of {kind} must be >= 1, got {value}")
        return cls(kind, value)

    def tensors(self, total: int) -> int:
        """How many of ``total`` tensors: of a fraction *p* at least one, otherwise ``int(total * p)``."""
        if isinstance(self.value, int):
            return min(self.value, total)
        return min(total, max(1, int(total * self.value)))

    def size(self, total: int) -> int:
        """How many of ``total`` parameters."""
        return self.value if isinstance(self.value, int) else int(total * self.value)

    def take(self, scores: Sequence[float], sizes: Sequence[int], total: int, size: int, *, largest: bool) -> int:
        """How many of a ranking are taken, from its head.

        Args:
            scores: in the order of the ranking, of those that may be chosen.
            sizes: parameters of each.
            total: how many weights were considered, those that may not be chosen too.
            size: how many parameters all of them have.
            largest: whether the ranking begins with the largest score.

        Returns:
            The length of the head. Of a budget of parameters: the longest whose sum is within it, and at least one.
        """
        if self.kind == "tensors":
            return min(len(scores), self.tensors(total))
        if self.kind == "threshold":
            inside = [score >= self.value if largest else score <= self.value for score in scores]
            return sum(inside)
        limit, taken, spent = self.size(size), 0, 0
        for number in sizes:
            if spent + number > limit:
                break
            spent += number
            taken += 1
        return max(taken, min(1, len(scores)))


__all__ = ["BudgetRule"]
