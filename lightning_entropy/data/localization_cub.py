"""CUB-200-2011 as it is published, without anyone's metadata."""

from __future__ import annotations

from pathlib import Path

from lightning_entropy.data.localization_rows import Folders, Row, held_out
from lightning_entropy.data.problems import Problems

_VAL_SHARE = 0.1


def is_cub(root: Path) -> bool:
    """Whether a folder is the published ``CUB_200_2011``."""
    return (root / "train_test_split.txt").is_file() and (root / "images.txt").is_file()


def read_cub(root: Path, *, val_count: int | None, seed: int) -> tuple[list[Row], list[str]]:
    """Read the images, their classes, boxes and split.

    The set has no validation images: a tenth of the training images, or ``val_count``, drawn evenly over the classes,
    are used so.

    Args:
        root: ``CUB_200_2011``.
        val_count: number of training images for validation.
        seed: of choosing them.

    Returns:
        The images and the names of the classes.

    Raises:
        ValueError: with the file and line of all that is wrong.
    """
    problems, folders = Problems(str(root)), Folders()
    tables = {
        name: _table(root / f"{name}.txt", fields, problems)
        for name, fields in (
            *(("classes", 1), ("images", 1), ("image_class_labels", 1)),
            *(("train_test_split", 1), ("bounding_boxes", 4)),
        )
    }
    problems.raise_any()
    classes = {key: label for label, key in enumerate(tables["classes"])}
    rows: list[Row] = []
    for key, (line, (name,)) in tables["images"].items():
        where = f"{root / 'images.txt'}, line {line}"
        absent = [
            table for table in ("image_class_labels", "train_test_split", "bounding_boxes") if key not in tables[table]
        ]
        if absent:
            problems.add(f"{where}: image {key} is not in {', '.join(f'{table}.txt' for table in absent)}")
            continue
        if not folders.has(str(root / "images"), name):
            problems.add(f"{where}: there is no image {root / 'images' / name}")
        at, (label,) = tables["image_class_labels"][key]
        if label not in classes:
            problems.add(f"{root / 'image_class_labels.txt'}, line {at}: class {label!r} is not in classes.txt")
            continue
        at, sides = tables["bounding_boxes"][key]
        try:
            x, y, width, height = map(float, sides)
        except ValueError:
            problems.add(f"{root / 'bounding_boxes.txt'}, line {at}: x y width height are numbers, got {sides}")
            continue
        split = "train" if tables["train_test_split"][key][1] == ["1"] else "test"
        box = (x, y, x + width, y + height)
        rows.append(Row(str(root / "images"), name, split, (classes[label],), (box,)))
    problems.raise_any()
    train = sum(row.split == "train" for row in rows)
    count = round(_VAL_SHARE * train) if val_count is None else val_count
    names = [fields[0] for _, fields in tables["classes"].values()]
    return held_out(rows, count, seed=seed), names


def _table(path: Path, fields: int, problems: Problems) -> dict[str, tuple[int, list[str]]]:
    """Lines of a number and ``fields`` values: to the line and the values."""
    if not path.is_file():
        problems.add(f"{path} does not exist")
        return {}
    found = {}
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        key, *values = text.split() or [""]
        if key and len(values) != fields:
            problems.add(f"{path}, line {line}: a number and {fields} more values are needed, got {text!r}")
        elif key:
            found[key] = (line, values)
    return found


__all__ = ["is_cub", "read_cub"]
