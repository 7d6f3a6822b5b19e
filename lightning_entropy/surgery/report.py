"""What a surgery did to a model, and how to take it back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Change:
    """One module that was changed.

    Args:
        module: its dotted name.
        what: what was done to it, in words that follow a count: ``"GELU swapped"``.
    """

    module: str
    what: str


@dataclass(frozen=True)
class Refusal:
    """One module that was left as it is.

    Args:
        module: its dotted name.
        reason: why.
    """

    module: str
    reason: str


def name_patterns(names: Iterable[str]) -> list[str]:
    """Names whose numbers alone differ, written once with ``*`` where they do.

    Args:
        names: dotted names.

    Returns:
        Patterns in the order in which their first names came.

    Example:
        >>> name_patterns(["blocks.0.mlp", "blocks.1.mlp", "head"])
        ['blocks.*.mlp', 'head']
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(tuple(_NUMBER.split(name)), []).append(_NUMBER.findall(name))
    patterns = []
    for words, numbers in groups.items():
        columns = [column[0] if len(set(column)) == 1 else "*" for column in zip(*numbers)]
        patterns.append("".join(word + number for word, number in zip(words, [*columns, ""])))
    return patterns


def _listed(names: list[str], most: int = 6) -> str:
    patterns = name_patterns(name or "the module itself" for name in names)
    more = [f"and {len(patterns) - most} more"] if len(patterns) > most else []
    return ", ".join(patterns[:most] + more)


@dataclass
class SurgeryReport:
    """What a surgery changed, what it refused and why, and its undo.

    ``str(report)`` is one line, ``report.table()`` a row a module. A copy of a report (by pickling or
    ``copy.deepcopy``) says the same and undoes nothing, since the modules are not the copy's.

    Args:
        method: who operated.
        changes: the modules that were changed.
        refused: the modules that were meant and left as they are.
        added_parameters: how many numbers were added to the model's parameters (negative: taken away).

    Example:
        >>> report = SurgeryReport("CRReLU", [Change("blocks.0.act", "GELU swapped")], [], 1)
        >>> print(report)
        CRReLU: 1 of 1 GELU swapped (blocks.0.act), +1 parameters; nothing refused
    """

    method: str
    changes: list[Change] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    added_parameters: int = 0
    undone: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def on_undo(self, function: Callable[[], Any]) -> None:
        """Have ``function()`` called by :meth:`undo`; the last that was registered is called first."""
        self._undo.append(function)

    def undo(self) -> None:
        """Take the surgery back. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self.undone = True

    def __str__(self) -> str:
        considered = len(self.changes) + len(self.refused)
        done: dict[str, list[str]] = {}
        for change in self.changes:
            done.setdefault(change.what, []).append(change.module)
        parts = [f"{len(names)} of {considered} {what} ({_listed(names)})" for what, names in done.items()]
        line = f"{self.method}: {', '.join(parts) or 'nothing changed'}"
        if self.added_parameters:
            line += f", {self.added_parameters:+,} parameters"
        reasons: dict[str, list[str]] = {}
        for refusal in self.refused:
            reasons.setdefault(refusal.reason, []).append(refusal.module)
        told = "; ".join(f"{_listed(names)} ({reason})" for reason, names in reasons.items())
        return f"{line}; refused: {told}" if told else f"{line}; nothing refused"

    def table(self) -> str:
        """A row a module: its name, and what was done or why it was refused."""
        rows = [(c.module or "(itself)", c.what) for c in self.changes]
        rows += [(r.module or "(itself)", f"refused: {r.reason}") for r in self.refused]
        width = max([len("module"), *(len(name) for name, _ in rows)])
        lines = [f"{'module':<{width}}  {self.method}", *(f"{name:<{width}}  {what}" for name, what in rows)]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as JSON: method, changes, refused, added_parameters, undone."""
        return json.dumps(self.record(), indent=2)

    def record(self) -> dict[str, Any]:
        """The report in plain values, as a checkpoint keeps it."""
        return {
            "method": self.method,
            "changes": [{"module": c.module, "what": c.what} for c in self.changes],
            "refused": [{"module": r.module, "reason": r.reason} for r in self.refused],
            "added_parameters": self.added_parameters,
            "undone": self.undone,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_undo": []}


__all__ = ["Change", "Refusal", "SurgeryReport", "name_patterns"]
