"""What an exchange of activations did: a record for each that was swapped, refused or kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_entropy.surgery.report import Change, Refusal, SurgeryReport, name_patterns


@dataclass(frozen=True)
class Swapped(Change):
    """One activation that was exchanged.

    Attributes:
        name: dotted name of the new module; ``module`` is the same.
        old: what was there: the class of a module, or the call as it is written.
        new: the class of the new module.
        parameters: how many numbers it added; 0 where it shares those of another.
        order: rank of its first use in the forward; None where nothing was run or it did not run.
        calls: how often it ran in one forward; None where nothing was run.
        operations: how many activation operations the dispatcher ran for it.
        also: other names of the same place, where a module is reachable by several paths.
        note: what a reader should know.
    """

    old: str = ""
    new: str = ""
    parameters: int = 0
    order: int | None = None
    calls: int | None = None
    operations: int = 0
    also: tuple[str, ...] = ()
    note: str = ""

    @property
    def name(self) -> str:
        """The dotted name."""
        return self.module


@dataclass(frozen=True)
class NotSwapped(Refusal):
    """One activation that was left as it is.

    Attributes:
        name: dotted name of it, or of the module in whose forward it runs; ``module`` is the same.
        old: what it is.
        order: rank of its first operation in the forward; None where it did not run.
        operations: how many activation operations the dispatcher ran for it.
    """

    old: str = ""
    order: int | None = None
    operations: int = 0

    @property
    def name(self) -> str:
        """The dotted name."""
        return self.module


@dataclass
class SwapReport(SurgeryReport):
    """What :func:`swap_activations` did; prints as a line and a table.

    Attributes:
        swapped: records of the activations that were exchanged, in the order of their first use.
        refused: those that were meant and could not be exchanged, with the reason.
        kept: those that ran and were not meant: gates that were not named, other families.
        already: names of those that an equal swap had exchanged before.
        note: why no forward was run, if none was: then order, calls, gates and calls of functions by other functions
            are not known.
    """

    swapped: list[Swapped] = field(default_factory=list)
    kept: list[NotSwapped] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    note: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._made: list[nn.Module] = []

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the new activations, each once; for optimizer groups. Empty after :meth:`undo`."""
        found = {} if self.undone else {id(p): p for module in self._made for p in module.parameters()}
        return list(found.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_made": []}

    def __str__(self) -> str:
        groups: dict[str, list[Swapped]] = {}
        for record in self.swapped:
            groups.setdefault(record.old, []).append(record)
        parts = []
        for old, records in groups.items():
            meant = len(records) + sum(r.old == old for r in self.refused if isinstance(r, NotSwapped))
            parts.append(f"{len(records)} of {meant} {old} swapped ({_listed([r.name for r in records])})")
        line = f"{self.method}: {', '.join(parts) or 'nothing swapped'}"
        if self.added_parameters:
            line += f", {self.added_parameters:+,} parameters"
        line += f"; {len(self.refused)} refused" if self.refused else "; nothing refused"
        if self.already:
            line += f"; {len(self.already)} swapped before"
        lines = [line]
        for title, others in (("refused", self.refused), ("kept", self.kept)):
            told: dict[tuple[str, str], list[str]] = {}
            for r in others:
                told.setdefault((getattr(r, "old", ""), r.reason), []).append(r.module)
            lines += [f"  {title}: {old} at {_listed(n)}: {reason}" for (old, reason), n in told.items()]
        notes: dict[str, list[str]] = {}
        for record in self.swapped:
            if record.note:
                notes.setdefault(record.note, []).append(record.name)
        lines += [f"  note: {_listed(names)}: {note}" for note, names in notes.items()]
        if self.note:
            lines.append(f"  note: {self.note}")
        return "\n".join(lines)

    def table(self) -> str:
        """A row an activation: order of first use, name, old, new or reason, parameters added, calls in a forward."""
        header = ("order", "name", "old", "new", "parameters", "calls")
        rows = [header]
        for s in self.swapped:
            rows.append((_cell(s.order), s.name, s.old, s.new + (f" ({s.note})" if s.note else ""), f"{s.parameters:+}",
                         _cell(s.calls)))  # fmt: skip
        for title, others in (("refused", self.refused), ("kept", self.kept)):
            for r in others:
                assert isinstance(r, NotSwapped)
                rows.append(("", r.name or "(itself)", r.old, f"{title}: {r.reason}", "", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)

    def record(self) -> dict[str, Any]:
        """The report in plain values, as a checkpoint keeps it."""
        return {
            **super().record(),
            "swapped": [
                {"name": s.name, "old": s.old, "new": s.new, "parameters": s.parameters, "order": s.order,
                 "calls": s.calls, "note": s.note}
                for s in self.swapped
            ],
            "kept": [{"name": r.name, "old": r.old, "reason": r.reason} for r in self.kept],
            "already": list(self.already),
            "note": self.note,
        }  # fmt: skip


def _cell(value: int | None) -> str:
    return "" if value is None else str(value)


def _listed(names: list[str], most: int = 4) -> str:
    patterns = name_patterns(name or "the model itself" for name in names)
    more = [f"and {len(patterns) - most} more"] if len(patterns) > most else []
    return ", ".join(patterns[:most] + more)


__all__ = ["NotSwapped", "SwapReport", "Swapped"]
