"""The table of slides: a CSV with their patients, labels, splits and folds."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_entropy.data.problems import Problems

DEFAULT_COLUMNS = {"slide": "slide", "patient": "patient", "label": "label", "split": "split", "fold": "fold"}
_OPTIONAL = ("patient", "split", "fold")
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True)
class TableRow:
    """One slide of a table, with the line of the file that it is on (the header is line 1)."""

    line: int
    slide: str
    patient: str
    label: str
    split: str | None
    fold: int | None


def read_table(path: Path, *, columns: Mapping[str, str] = DEFAULT_COLUMNS, problems: Problems) -> list[TableRow]:
    """Read and check a table.

    Args:
        path: a CSV with a header, or a ``.tsv``; UTF-8.
        columns: names of the columns ``slide``, ``patient``, ``label``, ``split`` and ``fold``. The last two
            and ``patient`` may be missing under their default names; a name of one's own must be there.
        problems: what is wrong is added here, with file and row.

    Returns:
        The rows that could be read.
    """
    if not path.is_file():
        problems.add(f"{path}: no such table")
        return []
    rows: list[TableRow] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            header = [name.strip() for name in next(reader, [])]
            places = _places(path, header, columns, problems)
            if places is None:
                return []
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    _read_row(path, reader.line_num, cells, header, places, rows, problems)
        except (UnicodeDecodeError, csv.Error) as error:
            problems.add(f"{path}: cannot be read as UTF-8 CSV: {error}")
            return rows
    if not rows and not problems:
        problems.add(f"{path}: the table has a header and no rows")
    rows = _without_duplicates(path, rows, problems)
    _check_patients(path, rows, problems)
    return rows


def _places(path: Path, header: list[str], columns: Mapping[str, str], problems: Problems) -> dict[str, int] | None:
    places: dict[str, int] = {}
    missing = False
    for role, name in columns.items():
        if header.count(name) > 1:
            problems.add(f"{path} row 1: column {name!r} is there {header.count(name)} times")
            missing = True
        elif name in header:
            places[role] = header.index(name)
        elif role not in _OPTIONAL or name != DEFAULT_COLUMNS[role]:
            close = difflib.get_close_matches(name, header, n=1, cutoff=0.4)
            hint = f"; did you mean {role}_column={close[0]!r}?" if close else f"; pass {role}_column=..."
            problems.add(f"{path} row 1: no column {name!r} among {header}{hint}")
            missing = True
    return None if missing else places


def _read_row(
    path: Path,
    line: int,
    cells: Sequence[str],
    header: list[str],
    places: dict[str, int],
    rows: list[TableRow],
    problems: Problems,
) -> None:
    where = f"{path} row {line}"
    if len(cells) != len(header):
        problems.add(f"{where}: {len(cells)} values, the header has {len(header)}")
        return
    values = {role: cells[place].strip() for role, place in places.items()}
    empty = [header[places[role]] for role in ("slide", "label", "patient") if values.get(role) == ""]
    if empty:
        problems.add(f"{where}: nothing in column {', '.join(empty)}")
        return
    split: str | None = None
    if "split" in values:
        split = _SPLITS.get(values["split"].lower())
        if split is None:
            problems.add(f"{where} (slide {values['slide']}): split {values['split']!r} is not train, val or test")
            return
    fold: int | None = None
    if "fold" in values:
        if not values["fold"].isdecimal():
            problems.add(f"{where} (slide {values['slide']}): fold {values['fold']!r} is not a number from 0")
            return
        fold = int(values["fold"])
    rows.append(TableRow(line, values["slide"], values.get("patient", values["slide"]), values["label"], split, fold))


def _without_duplicates(path: Path, rows: list[TableRow], problems: Problems) -> list[TableRow]:
    first: dict[str, TableRow] = {}
    for row in rows:
        other = first.setdefault(row.slide, row)
        if other is not row:
            problems.add(f"{path} row {row.line}: slide {row.slide} is also in row {other.line}")
    return list(first.values())


def _check_patients(path: Path, rows: list[TableRow], problems: Problems) -> None:
    first: dict[str, TableRow] = {}
    for row in rows:
        other = first.setdefault(row.patient, row)
        for what, mine, its in (("split", row.split, other.split), ("fold", row.fold, other.fold)):
            if mine != its:
                problems.add(
                    f"{path} row {row.line} (slide {row.slide}): patient {row.patient} is in {what} {mine}, "
                    f"and in {what} {its} by row {other.line}; all slides of a patient belong to one {what}"
                )


def class_names(rows: Sequence[TableRow]) -> list[str]:
    """The labels of a table, sorted: as numbers if all are, else as text."""
    names = {row.label for row in rows}
    if all(name.lstrip("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


__all__ = ["DEFAULT_COLUMNS", "TableRow", "class_names", "read_table"]
