"""The attention entropy of a run: what is kept of it in memory and in checkpoints, and its CSV file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from lightning_entropy.training.attention_report import QUANTITIES, AttentionEntropyReport, HeadLimits, Heads
from lightning_entropy.training.files import atomic_write

COLUMNS = ("step", "layer", "head", *QUANTITIES)


class EntropyHistory:
    """Readings in the order of their steps, at most ``most`` of them: beyond that every second one is dropped.

    The first and the last reading always stay. The CSV file has all.

    Args:
        most: how many readings are kept.
    """

    def __init__(self, most: int = 200) -> None:
        if most < 4:
            raise ValueError(f"most must be at least 4, got {most}")
        self.most = most
        self.readings: list[tuple[int, Heads]] = []

    def __len__(self) -> int:
        return len(self.readings)

    @property
    def last(self) -> int | None:
        """The step of the last reading."""
        return self.readings[-1][0] if self.readings else None

    def add(self, step: int, heads: Heads) -> None:
        """Keep a reading; one of the same step is replaced."""
        if self.readings and self.readings[-1][0] == step:
            self.readings.pop()
        self.readings.append((step, heads))
        if len(self.readings) > self.most:
            self.readings = [*self.readings[:-1:2], self.readings[-1]]

    def reports(self, limits: HeadLimits) -> list[AttentionEntropyReport]:
        """The readings as reports."""
        return [AttentionEntropyReport(heads, step, limits) for step, heads in self.readings]

    def rows(self) -> list[dict[str, Any]]:
        """One row a step, layer and head."""
        return [row for step, heads in self.readings for row in AttentionEntropyReport(heads, step).rows()]

    def state_dict(self) -> list[dict[str, Any]]:
        """Readings with the same layers as one tensor ``(readings, 4, heads of all layers)``."""
        runs: list[dict[str, Any]] = []
        for step, heads in self.readings:
            layout = [[name, values.shape[1]] for name, values in heads.items()]
            if not runs or runs[-1]["layers"] != layout:
                runs.append({"layers": layout, "steps": [], "values": []})
            runs[-1]["steps"].append(step)
            runs[-1]["values"].append(torch.cat(list(heads.values()), 1))
        return [{**run, "values": torch.stack(run["values"])} for run in runs]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Continue from a checkpoint."""
        self.readings = []
        for run in state:
            names, sizes = [name for name, _ in run["layers"]], [size for _, size in run["layers"]]
            for step, values in zip(run["steps"], run["values"]):
                parts = values.cpu().split(sizes, 1)
                self.readings.append((int(step), {name: part.clone() for name, part in zip(names, parts)}))


def unused(path: Path) -> Path:
    """The path, or with ``-1``, ``-2``, ... before its suffix the first that does not exist."""
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows in one write; the header comes first where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(_line(row) for row in rows)
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(lines if file.tell() else ",".join(COLUMNS) + "\n" + lines)


def continue_file(path: Path, earlier: Path | None, history: EntropyHistory) -> None:
    """Write the file of a resumed run up to where its checkpoint was: the rows of the earlier file, or those kept.

    A run that was killed may have written more than its checkpoint knows, and half a line.

    Args:
        path: the file to write.
        earlier: the file of the run that goes on, if it still exists; may be the same.
        history: what the checkpoint kept.
    """
    last = history.last
    rows: list[dict[str, Any]] = []
    if earlier is not None and earlier.is_file():
        with earlier.open(encoding="utf-8", newline="") as file:
            known = [row for row in csv.DictReader(file) if _whole(row)]
        rows = [row for row in known if last is not None and int(row["step"]) <= last]
    rows = rows or history.rows()
    if not rows:
        return
    with atomic_write(path) as temporary:
        append_rows(temporary, rows)


def _whole(row: dict[str, Any]) -> bool:
    return None not in row and None not in row.values() and row["step"].isdecimal()


def _line(row: dict[str, Any]) -> str:
    layer = row["layer"]
    if any(c in layer for c in ',"\n'):
        layer = '"' + layer.replace('"', '""') + '"'
    numbers = (v if isinstance(v, str) else f"{v:.6g}" for v in (row[name] for name in QUANTITIES))
    return ",".join([str(row["step"]), layer, str(row["head"]), *numbers]) + "\n"


__all__ = ["COLUMNS", "EntropyHistory", "append_rows", "continue_file", "unused"]
