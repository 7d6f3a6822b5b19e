"""Metadata of weakly supervised localization as clovaai/wsolevaluation writes it: four text files for each split."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_entropy.data.image_source import SPLITS
from lightning_entropy.data.localization_rows import Folders, Row
from lightning_entropy.data.problems import Problems

_Box = tuple[float, float, float, float]
_LOOKED_FOR = 100  # names, one of which must be there for a folder to be the one that they start from


def has_metadata(folder: Path) -> bool:
    """Whether a folder has a split with such files."""
    return any((folder / split / "image_ids.txt").is_file() for split in SPLITS)


def read_metadata(
    metadata: Path, *, roots: Sequence[Path], mask_roots: Sequence[Path], multilabel: bool
) -> tuple[list[Row], list[str]]:
    """Read all splits.

    Args:
        metadata: the folder with ``train``, ``val`` and ``test``.
        roots: folders that images may be named from, the first that fits is taken for each split; ``SPLIT`` in their
            last part stands for the split.
        mask_roots: likewise for masks; the folder of the images is tried first.
        multilabel: whether an image may have several lines in ``class_labels.txt``.

    Returns:
        The images and the names of the classes.

    Raises:
        ValueError: with file and line of all that is wrong.
    """
    problems = Problems(str(metadata))
    splits = [split for split in SPLITS if (metadata / split).is_dir()]
    if "train" not in splits:
        raise ValueError(f"{metadata} must hold a folder train with image_ids.txt and class_labels.txt")
    folders = Folders()
    rows: list[Row] = []
    for split in splits:
        reader = _Split(metadata / split, split, problems, multilabel=multilabel)
        rows += reader.rows(roots, mask_roots, folders)
    problems.raise_any()
    present = {label for row in rows if row.split == "train" for label in row.labels}
    count = max((label for row in rows for label in row.labels), default=-1) + 1
    absent = [label for label in range(count) if label not in present]
    if absent:
        shown = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        raise ValueError(
            f"{metadata}: labels go up to {count - 1} and class {shown} has no image in train; classes are counted "
            "from 0, without gaps"
        )
    return rows, _names([row for row in rows if row.split == "train"], count)


def _names(rows: Sequence[Row], count: int) -> list[str]:
    """The folder that the images of a class are in, if it is theirs alone; otherwise the number of the class."""
    found: dict[int, set[str]] = defaultdict(set)
    for row in rows:
        for label in row.labels:
            found[label].add(Path(row.name).parent.name)
    names = [next(iter(found[label])) if len(found[label]) == 1 else "" for label in range(count)]
    alone = all(names) and len(set(names)) == count
    return names if alone else [str(label) for label in range(count)]


class _Split:
    """The files of one split."""

    def __init__(self, folder: Path, split: str, problems: Problems, *, multilabel: bool) -> None:
        self.folder, self.split, self.problems = folder, split, problems
        self.images: dict[str, int] = {}  # to the line that names it
        for line, name in self._lines("image_ids.txt"):
            if name in self.images:
                self._problem("image_ids.txt", line, f"{name} is also in line {self.images[name]}")
            self.images.setdefault(name, line)
        self.labels = self._labels(multilabel)
        self.sizes = self._sizes() if (folder / "image_sizes.txt").is_file() else {}
        self.boxes: dict[str, list[_Box]] = defaultdict(list)
        self.masks: dict[str, list[str]] = defaultdict(list)
        self.ignored: dict[str, str] = {}
        self.mask_lines: dict[str, int] = {}
        if split != "train" or (folder / "localization.txt").is_file():
            self._localization()

    def rows(self, roots: Sequence[Path], mask_roots: Sequence[Path], folders: Folders) -> list[Row]:
        """The images, whose files exist."""
        root = self._root(list(self.images), "image_ids.txt", roots, folders)
        if root is None:
            return []
        for name, line in self.images.items():
            if not folders.has(root, name):
                self._problem("image_ids.txt", line, f"there is no image {Path(root) / name}")
        mask_root = ""
        if self.mask_lines:
            found = self._root(list(self.mask_lines), "localization.txt", [Path(root), *mask_roots], folders)
            if found is None:
                return []
            mask_root = found
            for name, line in self.mask_lines.items():
                if not folders.has(mask_root, name):
                    self._problem("localization.txt", line, f"there is no mask {Path(mask_root) / name}")
        return [
            Row(
                root,
                name,
                self.split,
                self.labels.get(name, ()),
                tuple(self.boxes.get(name, ())),
                self.sizes.get(name),
                tuple(str(Path(mask_root) / path) for path in self.masks.get(name, ())),
                str(Path(mask_root) / self.ignored[name]) if self.ignored.get(name) else "",
            )
            for name in self.images
        ]

    def _root(self, names: Sequence[str], file: str, roots: Sequence[Path], folders: Folders) -> str | None:
        tried = [str(root.parent / self.split if root.name == "SPLIT" else root) for root in roots]
        for root in dict.fromkeys(tried):
            if any(folders.has(root, name) for name in names[:_LOOKED_FOR]):
                return root
        if not names:
            self.problems.add(f"{self.folder / file}: no images")
        else:
            where = ", ".join(dict.fromkeys(tried))
            self.problems.add(
                f"{self.folder / file}: {names[0]} is in none of {where}; pass image_root= with the folder that names "
                "start from"
            )
        return None

    def _labels(self, multilabel: bool) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        shared: dict[tuple[int, ...], tuple[int, ...]] = {}  # a million images have few different ones
        for line, text in self._lines("class_labels.txt"):
            name, _, label = text.rpartition(",")
            if not self._known("class_labels.txt", line, name):
                continue
            if not label.strip().isdecimal():
                self._problem("class_labels.txt", line, f"{label!r} is no class, which is an integer from 0")
            elif name in found and not multilabel:
                self._problem(
                    "class_labels.txt", line, f"{name} has a label already; several labels an image: multilabel=True"
                )
            else:
                labels = tuple(sorted({*found.get(name, ()), int(label)}))
                found[name] = shared.setdefault(labels, labels)
        for name, line in self.images.items():
            if name not in found and not multilabel:
                self._problem("image_ids.txt", line, f"{name} has no line in class_labels.txt")
        return found

    def _sizes(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for line, text in self._lines("image_sizes.txt"):
            name, *sides = text.rsplit(",", 2)
            if not self._known("image_sizes.txt", line, name):
                continue
            if len(sides) != 2 or not all(side.strip().isdecimal() and 0 < int(side) < 2**31 for side in sides):
                self._problem("image_sizes.txt", line, f"NAME,WIDTH,HEIGHT is needed, got {text!r}")
            else:
                found[name] = (int(sides[1]), int(sides[0]))
        return found

    def _localization(self) -> None:
        file = "localization.txt"
        for line, text in self._lines(file):
            name, *sides = text.rsplit(",", 4)
            box = _numbers(sides)
            if box is not None:
                if not self._known(file, line, name):
                    continue
                if box[0] >= box[2] or box[1] >= box[3]:
                    self._problem(file, line, f"a box is x0,y0,x1,y1 with x0 < x1 and y0 < y1, got {','.join(sides)}")
                else:
                    self.boxes[name].append(box)
                continue
            parts = text.split(",")
            if len(parts) != 3 or not parts[1]:
                self._problem(file, line, f"NAME,x0,y0,x1,y1 or NAME,MASK,IGNORED is needed, got {text!r}")
            elif self._known(file, line, parts[0]):
                self._mask(line, *parts)
        if self.boxes and self.masks:
            self.problems.add(f"{self.folder / file}: some lines are boxes and some are masks")

    def _mask(self, line: int, name: str, mask: str, ignored: str) -> None:
        self.masks[name].append(mask)
        self.mask_lines.setdefault(mask, line)
        if not ignored:
            return
        self.mask_lines.setdefault(ignored, line)
        if self.ignored.setdefault(name, ignored) != ignored:
            self._problem("localization.txt", line, f"{name} has another mask of ignored pixels already")

    def _known(self, file: str, line: int, name: str) -> bool:
        if name not in self.images:
            self._problem(file, line, f"{name!r} is not in image_ids.txt")
        return name in self.images

    def _lines(self, file: str) -> Iterator[tuple[int, str]]:
        path = self.folder / file
        if not path.is_file():
            self.problems.add(f"{path} does not exist")
            return
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            self.problems.add(f"{path} is not UTF-8 text: {error}")
            return
        yield from ((i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip())

    def _problem(self, file: str, line: int, text: str) -> None:
        self.problems.add(f"{self.folder / file}, line {line}: {text}")


def _numbers(texts: Sequence[str]) -> _Box | None:
    if len(texts) != 4:
        return None
    try:
        x0, y0, x1, y1 = (float(text) for text in texts)
    except ValueError:
        return None
    return (x0, y0, x1, y1) if all(map(math.isfinite, (x0, y0, x1, y1))) else None


__all__ = ["has_metadata", "read_metadata"]
