"""Says when attention has collapsed, or stays uniform, for several readings in a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_entropy.training.attention_report import AttentionEntropyReport

_GRACE = 10  # times the patience, for heads that have been uniform since the first reading, as new models are


class EntropyAlarm:
    """Counts for each head how many readings in a row it was collapsed, and overloaded.

    A new model's attention is nearly uniform. A head that has never been below the limit of overload is given ten times
    the patience before it is called overloaded.

    Args:
        patience: how many readings in a row make an alarm.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.collapsed: dict[str, Tensor] = {}
        self.overloaded: dict[str, Tensor] = {}
        self.differed: dict[str, Tensor] = {}
        self._said: set[str] = set()

    def update(self, report: AttentionEntropyReport) -> list[str]:
        """Count a reading; the messages that are due, each kind once a run."""
        for name, values in report.heads.items():
            collapsed, overloaded = report.limits.collapsed(values), report.limits.overloaded(values)
            self.collapsed[name] = _count(self.collapsed.get(name), collapsed)
            self.overloaded[name] = _count(self.overloaded.get(name), overloaded)
            before = self.differed.get(name)
            differs = ~overloaded & values[1].isfinite()
            self.differed[name] = differs if before is None or before.shape != differs.shape else before | differs
        due = []
        limits = report.limits
        heads = {name: counts >= self.patience for name, counts in self.collapsed.items()}
        if "collapse" not in self._said and any(bool(h.any()) for h in heads.values()):
            self._said.add("collapse")
            due.append(
                f"attention has collapsed in {_named(heads)}: normalised entropy below {limits.collapse:g} in "
                f"{self.patience} readings in a row (up to step {report.step}); attention sinks are not counted. "
                'SigmaReparam() keeps it from collapsing, AttentionEntropyRegularizer(objective="floor") holds it up; '
                "a lower learning rate or a longer warm-up may do."
            )
        heads = {
            name: counts >= torch.where(self.differed[name], self.patience, _GRACE * self.patience)
            for name, counts in self.overloaded.items()
        }
        if "overload" not in self._said and any(bool(h.any()) for h in heads.values()):
            self._said.add("overload")
            due.append(
                f"attention stays uniform in {_named(heads)}: normalised entropy above {limits.overload:g} in "
                f"{self.patience} readings or more in a row (up to step {report.step}), so these heads only average. "
                'AttentionEntropyRegularizer(objective="ceiling") or LearnableTemperature() let them focus.'
            )
        return due

    def rearm(self) -> None:
        """Say everything again, in a new run; what was counted stays."""
        self._said.clear()

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        kinds = {"collapsed": self.collapsed, "overloaded": self.overloaded, "differed": self.differed}
        return {kind: {name: counts.tolist() for name, counts in found.items()} for kind, found in kinds.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.collapsed, self.overloaded, self.differed = (
            {name: torch.tensor(counts) for name, counts in state[kind].items()}
            for kind in ("collapsed", "overloaded", "differed")
        )


def _count(before: Tensor | None, now: Tensor) -> Tensor:
    if before is None or before.shape != now.shape:
        before = torch.zeros_like(now, dtype=torch.int64)
    return torch.where(now, before + 1, 0)


def _named(heads: dict[str, Tensor]) -> str:
    """``2 of 36 heads (blocks.10.attn: 0; blocks.11.attn: 0, 2)``."""
    found = {name: h.nonzero().flatten().tolist() for name, h in heads.items() if h.any()}
    total, count = sum(len(h) for h in heads.values()), sum(len(h) for h in found.values())
    places = [f"{name}: {', '.join(map(str, h))}" for name, h in found.items()]
    more = [f"and {len(places) - 6} more layers"] if len(places) > 6 else []
    return f"{count} of {total} heads ({'; '.join(places[:6] + more)})"


__all__ = ["EntropyAlarm"]
