"""Bags whose features are in files: table and files are checked together before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lightning_entropy.data.bag_files import BagFile, open_bag_file
from lightning_entropy.data.bag_layout import BagFolder, find_layout
from lightning_entropy.data.bag_table import DEFAULT_COLUMNS, TableRow, class_names, read_table
from lightning_entropy.data.h5_rows import H5Handles
from lightning_entropy.data.problems import BagFileError, Problems
from lightning_entropy.data.source import Bag
from lightning_entropy.data.value_check import check_values
from lightning_entropy.verbosity import announce

_UNKNOWN = ""  # the label of a slide that no table labels


@dataclass
class FolderBags:
    """A :class:`~lightning_entropy.data.BagSource` of feature files; :func:`open_bags` makes it."""

    slides: list[str]
    labels: list[int]
    patients: list[str]
    splits: list[str | None]
    folds: list[int | None]
    classes: list[str]
    files: list[BagFile]
    handles: H5Handles
    standardize: bool = False
    in_features: int = field(init=False)
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = [bag.features.count for bag in self.files]
        self.in_features = next(bag.features.width for bag in self.files if bag.features.count)

    def read(self, index: int, rows: np.ndarray | None = None) -> Bag:
        """Read one bag, or only some rows of it, from its file.

        Raises:
            ValueError: if the file cannot be read any more; the message names it.
        """
        try:
            return self.files[index].read(rows)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.files[index].path} (slide {self.slides[index]}): {error}") from error

    def close(self) -> None:
        """Close the files that this process holds open."""
        self.handles.close()


def open_bags(
    features: Path,
    *,
    table: Path | None = None,
    layout: str = "auto",
    columns: Mapping[str, str] = DEFAULT_COLUMNS,
    classes: Sequence[str] | None = None,
    on_empty: str = "error",
    check_values: bool = True,
) -> FolderBags:
    """Open bags of features on disk.

    Args:
        features: folder of feature files, or the AEM authors' one file.
        table: CSV of slides; None takes all slides that there are features of, with the labels inside the AEM
            authors' file and without labels elsewhere.
        layout: see :mod:`lightning_entropy.data.bag_files`.
        columns: names of the table's columns.
        classes: labels in the order of the classes; None for those found.
        on_empty: ``"error"`` or ``"skip"`` for bags without instances.
        check_values: read every number once to find those that are not finite.

    Returns:
        The source.

    Raises:
        FileNotFoundError: if ``features`` does not exist.
        ValueError: if the layout cannot be told, or with everything that is wrong with table and files.
    """
    handles = H5Handles()
    folder = find_layout(features, layout=layout, handles=handles)
    problems = Problems(f"SlideBags({features}{'' if table is None else f', {table}'})")
    if table is None:
        rows = _rows_without_table(folder, handles, problems)
    else:
        rows = read_table(table, columns=columns, problems=problems)
    names = _classes(rows, classes, table or features, problems)
    opened = _open_files(rows, folder, table, on_empty, handles, problems)
    _check_widths(opened, problems)
    if not problems and not opened:
        problems.add(f"{features}: every bag is empty")
    if check_values and not problems:
        _check_finite(opened, folder, problems)
    handles.close()  # HDF5 locks what is open; what is read through the library is opened again when it is read
    problems.raise_any()
    kept = [row for row, _, _ in opened]
    return FolderBags(
        [row.slide for row in kept],
        [names.index(row.label) if row.label != _UNKNOWN else -1 for row in kept],
        [row.patient for row in kept],
        [row.split for row in kept],
        [row.fold for row in kept],
        names,
        [bag for _, bag, _ in opened],
        handles,
    )


_Opened = list[tuple[TableRow, BagFile, str]]  # the row, its file, and both named in words


def _rows_without_table(folder: BagFolder, handles: H5Handles, problems: Problems) -> list[TableRow]:
    rows = []
    for slide in folder.names(handles):
        label = _UNKNOWN
        if folder.layout == "aem":
            value = handles.get(folder.root)[slide].attrs.get("label")
            if value is None:
                problems.add(f"{folder.root} group {slide}: no attribute label, and no table was given")
                continue
            value = np.asarray(value).reshape(-1)[0]
            label = value.decode() if isinstance(value, bytes) else str(value)
        rows.append(TableRow(0, slide, slide, label, None, None))
    return rows


def _classes(rows: list[TableRow], given: Sequence[str] | None, where: Path, problems: Problems) -> list[str]:
    labelled = [row for row in rows if row.label != _UNKNOWN]
    if given is None:
        names = class_names(labelled)
        if labelled and len(names) < 2:
            problems.add(f"{where}: all {len(labelled)} slides have the label {names[0]!r}; classes need two at least")
        return names
    names = list(given)
    for row in labelled:
        if row.label not in names:
            problems.add(f"{where} row {row.line} (slide {row.slide}): label {row.label!r} is not one of {names}")
    return names


def _open_files(
    rows: list[TableRow],
    folder: BagFolder,
    table: Path | None,
    on_empty: str,
    handles: H5Handles,
    problems: Problems,
) -> _Opened:
    opened: _Opened = []
    skipped = 0
    for row in rows:
        path = folder.find(row.slide)
        group = row.slide if folder.layout == "aem" else None
        where = f"{path}" if table is None else f"{table} row {row.line} (slide {row.slide}): {path}"
        if group is not None:
            where += f" group {group}"
        try:
            bag = open_bag_file(path, layout=folder.layout, handles=handles, group=group)
        except BagFileError as error:
            problems.add(f"{where}: {error}")
            continue
        if bag.features.count:
            opened.append((row, bag, where))
        elif on_empty == "skip":
            skipped += 1
        else:
            problems.add(f"{where}: no instances; on_empty='skip' leaves such slides out")
    if skipped:
        announce(f"SlideBags: {skipped} of {len(rows)} slides have no instances and are left out")
    return opened


def _check_widths(opened: _Opened, problems: Problems) -> None:
    widths = Counter(bag.features.width for _, bag, _ in opened)
    if len(widths) < 2:
        return
    usual, count = widths.most_common(1)[0]
    for _, bag, where in opened:
        if bag.features.width != usual:
            problems.add(f"{where}: {bag.features.width} features, {count} other slides have {usual}")


def _check_finite(opened: _Opened, folder: BagFolder, problems: Problems) -> None:
    check_values(
        [bag for _, bag, _ in opened],
        where=[where for _, _, where in opened],
        root=folder.root,
        problems=problems,
    )


__all__ = ["FolderBags", "open_bags"]
