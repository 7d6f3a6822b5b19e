"""A choice of weights as data: scores, bounds, what was skipped and why, and whose weights they were."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_entropy.files import read_record, write_text
from lightning_entropy.surgery.report import Refusal, SurgeryReport, name_patterns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Budget = float | Mapping[str, float]
MODES = ("full", "lora")


@dataclass(frozen=True)
class ScoredWeight:
    """One weight that could be chosen.

    Args:
        name: of the parameter in the model, without the wrapping of adapters: ``"layer.0.output.dense.weight"``.
        module: dotted name of the module that holds it.
        score: what it is ranked by; where ``exact`` is false a bound, which was enough to leave it out.
        error: bound on the relative error of an exact score; 0 for scores that are no measurement.
        exact: whether the score was computed rather than bounded.
        lower_bound: a number that the score is certainly not below; equals ``score`` where that is exact.
        shape: as the module stores it.
        parameters: how many numbers.
        chosen: whether it is part of the selection.
        group: what it was ranked within, with ``normalize="type"``; empty otherwise.
    """

    name: str
    module: str
    score: float
    error: float
    exact: bool
    lower_bound: float
    shape: tuple[int, ...]
    parameters: int
    chosen: bool
    group: str = ""


@dataclass
class Selection:
    """Weights of a model that were chosen by a score.

    Printed it is one line; :meth:`table` has a row a weight. JSON is its only file format: nothing is unpickled.

    Args:
        by: the score.
        rows: every weight that was considered, best first.
        normalize: how the scores were corrected, or None.
        budget: as it was given: a count, a fraction, or a mapping with one of ``tensors``,
            ``parameters``, ``threshold``.
        largest: whether the largest scores were chosen rather than the smallest.
        skipped: weights that could not be scored or may not be chosen, and why.
        fingerprint: of the weights that were scored; see :func:`~lightning_entropy.observe.weights_fingerprint`.
        notes: warnings, in words.

    Example:
        >>> row = ScoredWeight("0.weight", "0", 3.0, 1e-9, True, 3.0, (4, 2), 8, True)
        >>> print(Selection("condition_number", [row], budget=1))
        1 of 1 weights by lowest condition_number (0.weight), 8 of 8 parameters
    """

    by: str
    rows: list[ScoredWeight]
    normalize: str | None = None
    budget: Budget = 0.2
    largest: bool = False
    skipped: list[Refusal] = field(default_factory=list)
    fingerprint: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> list[ScoredWeight]:
        """The rows that were chosen, best first."""
        return [row for row in self.rows if row.chosen]

    @property
    def names(self) -> list[str]:
        """Names of the chosen parameters, best first."""
        return [row.name for row in self.chosen]

    @property
    def modules(self) -> list[str]:
        """Names of the modules that hold them, each once."""
        return list(dict.fromkeys(row.module for row in self.chosen))

    @property
    def parameters(self) -> int:
        """How many numbers the chosen weights have."""
        return sum(row.parameters for row in self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def __str__(self) -> str:
        total = sum(row.parameters for row in self.rows)
        end = "highest" if self.largest else "lowest"
        corrected = f" normalised by {self.normalize}" if self.normalize else ""
        patterns = name_patterns(self.names)
        listed = ", ".join(patterns[:6]) + (f", and {len(patterns) - 6} more" if len(patterns) > 6 else "")
        skipped = f"; {len(self.skipped)} skipped" if self.skipped else ""
        return (
            f"{len(self)} of {len(self.rows)} weights by {end} {self.by}{corrected} ({listed or 'none'}), "
            f"{self.parameters:,} of {total:,} parameters{skipped}"
        )

    def table(self) -> str:
        """A row a weight, best first: whether it is chosen, its name, its score or bound, shape and size."""
        heads = ["", "weight", self.by, "error", "shape", "parameters"]
        cells = [heads]
        for row in self.rows:
            score = f"{row.score:.6g}" if row.exact else f">= {row.lower_bound:.4g}"
            error = f"{row.error:.0e}" if row.exact and row.error else "-"
            shape = " x ".join(map(str, row.shape))
            cells.append(["*" if row.chosen else "", row.name, score, error, shape, f"{row.parameters:,}"])
        widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
        lines = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
            for line in cells
        ]
        lines += [f"skipped {refusal.module}: {refusal.reason}" for refusal in self.skipped]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def plot(self) -> Figure:
        """The score of every weight in the order of the ranking, chosen ones filled; on a figure without pyplot."""
        from lightning_entropy.surgery.selection_figure import selection_figure

        return selection_figure(self)

    def record(self) -> dict[str, Any]:
        """The selection in plain values, as a checkpoint keeps it; numbers that are not finite as text."""
        rows = []
        for row in self.rows:
            values: dict[str, Any] = {f.name: getattr(row, f.name) for f in fields(row)}
            for name in ("score", "error", "lower_bound"):
                values[name] = _plain(values[name])
            rows.append({**values, "shape": list(row.shape)})
        return {
            "by": self.by,
            "normalize": self.normalize,
            "budget": dict(self.budget) if isinstance(self.budget, Mapping) else self.budget,
            "largest": self.largest,
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
            "skipped": [{"module": r.module, "reason": r.reason} for r in self.skipped],
            "rows": rows,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Selection:
        """The selection of which :meth:`record` told.

        Raises:
            ValueError: if something is missing, naming it.
        """
        try:
            rows = [
                ScoredWeight(
                    **{
                        **row,
                        "shape": tuple(row["shape"]),
                        **{name: float(row[name]) for name in ("score", "error", "lower_bound")},
                    }
                )
                for row in record["rows"]
            ]
            return cls(
                by=record["by"],
                rows=rows,
                normalize=record["normalize"],
                budget=record["budget"],
                largest=bool(record["largest"]),
                skipped=[Refusal(r["module"], r["reason"]) for r in record["skipped"]],
                fingerprint=record["fingerprint"],
                notes=list(record["notes"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this is not the record of a Selection ({type(error).__name__}: {error}). A record has by, normalize, "
                "budget, largest, fingerprint, notes, skipped and rows; Selection.save writes one."
            ) from error

    def to_json(self) -> str:
        """The selection as JSON."""
        return json.dumps(self.record(), indent=2, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the selection to a JSON file, whole or not at all."""
        return write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: if it is no such file.
        """
        return read_record(path, cls.from_record, kind="selection", writer="Selection.save")

    def matches(self, model: nn.Module) -> bool:
        """Whether the weights of ``model`` are the ones that were scored (their fingerprint is the same).

        False also where the model lacks one of them. Training changes weights, so this tells before it, not after.
        """
        from lightning_entropy.observe.model_weights import model_fingerprint

        return bool(self.fingerprint) and model_fingerprint(model, [row.name for row in self.rows]) == self.fingerprint

    def apply(self, model: nn.Module, *, mode: str = "full", **options: Any) -> SurgeryReport:
        """Make the chosen weights the only trained ones.

        Args:
            model: that has them.
            mode: ``"full"`` trains the weights themselves, ``"lora"`` adapters beside them.
            **options: of :func:`~lightning_entropy.surgery.trainable.train_only` or
                :func:`~lightning_entropy.surgery.lora.inject_lora`.

        Returns:
            What was done, with its undo.

        Raises:
            ValueError: if nothing is chosen or the mode is unknown.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not self.names:
            raise ValueError(f"nothing is chosen, so that nothing would train: {self}. Raise the budget.")
        if mode == "full":
            from lightning_entropy.surgery.trainable import train_only

            return train_only(model, self.names, **options)
        from lightning_entropy.surgery.lora import inject_lora

        return inject_lora(model, self.names, **options)

    def choose(self, names: list[str]) -> Selection:
        """The same selection with these parameters chosen instead.

        Raises:
            ValueError: if one of them is not among the rows.
        """
        unknown = sorted(set(names) - {row.name for row in self.rows})
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is not among the {len(self.rows)} weights of this selection")
        return replace(self, rows=[replace(row, chosen=row.name in set(names)) for row in self.rows])


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


__all__ = ["Budget", "ScoredWeight", "Selection"]
