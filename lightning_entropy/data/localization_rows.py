"""Images in files with their boxes and masks: how they are listed, drawn from and read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lightning_entropy.data.localization_picture import IGNORED, LocalizationSource, Picture, nearest

FILE_SIZE = 224  # what images are brought to when nothing else is asked for


class Row(NamedTuple):
    """One image.

    Attributes:
        root: the folder that its name starts from.
        name: its path below that folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        labels: its classes.
        boxes: x0, y0, x1, y1 with exclusive right and bottom edges.
        size: height and width that the boxes refer to; None for those of the file.
        masks: files, one for each object.
        ignored: file of the pixels that do not count, or "".
    """

    root: str
    name: str
    split: str
    labels: tuple[int, ...]
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    size: tuple[int, int] | None = None
    masks: tuple[str, ...] = ()
    ignored: str = ""


def balanced(labels: Sequence[tuple[int, ...]], count: int, *, seed: int) -> list[int]:
    """Draw positions so that classes (the first of each image) are as equally frequent as they can be.

    Args:
        labels: classes of the images.
        count: how many; all, where there are fewer.
        seed: of the drawing.

    Returns:
        Positions in ascending order.

    Example:
        >>> balanced([(0,), (0,), (0,), (1,)], 2, seed=0)[-1]
        3
    """
    seen: Counter[tuple[int, ...]] = Counter()
    ranked = []
    for place, position in enumerate(np.random.default_rng(seed).permutation(len(labels)).tolist()):
        first = labels[position][:1]
        ranked.append((seen[first], place, position))
        seen[first] += 1
    return sorted(position for _, _, position in sorted(ranked)[:count])


def drawn(rows: Sequence[Row], counts: Mapping[str, int | None], *, seed: int) -> list[Row]:
    """Draw as many images of each split as are wanted.

    Args:
        rows: all images.
        counts: number for each split; None for all.
        seed: of the drawing.

    Raises:
        ValueError: if a split has fewer images.
    """
    kept = set(range(len(rows)))
    for split, count in counts.items():
        own = [i for i, row in enumerate(rows) if row.split == split]
        if count is None:
            continue
        if count > len(own):
            raise ValueError(f"{split}_count is {count:,}, and there are {len(own):,} images in {split}")
        kept -= set(own) - {own[i] for i in balanced([rows[i].labels for i in own], count, seed=seed)}
    return [row for i, row in enumerate(rows) if i in kept]


def held_out(
    rows: Sequence[Row], count: int, *, seed: int, among: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Move training images to validation, where a set comes without a validation split.

    Args:
        rows: all images, none in validation.
        count: how many.
        seed: of the drawing.
        among: which training images may be moved.

    Raises:
        ValueError: if no image would be left to train on.
    """
    own = [i for i, row in enumerate(rows) if row.split == "train" and among(row)]
    if count >= sum(row.split == "train" for row in rows):
        raise ValueError(f"val_count={count:,} leaves no images to train on")
    moved = {own[i] for i in balanced([rows[i].labels for i in own], count, seed=seed)}
    return [row._replace(split="val") if i in moved else row for i, row in enumerate(rows)]


def source_of_rows(
    rows: Sequence[Row],
    classes: Sequence[str],
    *,
    multilabel: bool,
    has_masks: bool,
    mask_classes: bool = False,
) -> LocalizationSource:
    """Make a source of listed images.

    Args:
        rows: the images.
        classes: names of the classes.
        multilabel: whether images may have several.
        has_masks: whether there are masks.
        mask_classes: whether a mask is one file of class indices instead of a file for each object.
    """
    read_masks = _class_mask if mask_classes else _object_masks
    several = len({row.name for row in rows}) < len(rows)  # one name in two splits

    return LocalizationSource(
        names=[f"{row.split}/{row.name}" if several else row.name for row in rows],
        labels=[row.labels for row in rows],
        classes=classes,
        splits=[row.split for row in rows],
        multilabel=multilabel,
        has_masks=has_masks,
        mask_classes=mask_classes,
        image_size=FILE_SIZE,
        mirrored=True,
        read=partial(_read, rows, read_masks),
    )


@dataclass
class Folders:
    """Which files exist, asked for in bulk: every folder is listed once."""

    _listed: dict[str, frozenset[str]] = field(default_factory=dict)

    def has(self, root: str, name: str) -> bool:
        """Whether ``name`` exists below ``root``."""
        folder, _, file = os.path.join(root, name).rpartition(os.sep)
        if folder not in self._listed:
            self._listed[folder] = frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()
        return file in self._listed[folder]


def open_image(path: str | Path, mode: str | None) -> np.ndarray:
    """Read an image file.

    Args:
        path: the file.
        mode: of PIL, that it is converted to; None as it is.

    Raises:
        ValueError: if it cannot be read, with its name.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image if mode is None else image.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:  # PIL's answers to a damaged file do not name it
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


_Masks = tuple[np.ndarray, Sequence[tuple[float, float, float, float]]]


def _read(rows: Sequence[Row], read_masks: Callable[[Row, tuple[int, int]], _Masks], index: int) -> Picture:
    row = rows[index]
    pixels = open_image(os.path.join(row.root, row.name), "RGB")
    size = row.size or (pixels.shape[0], pixels.shape[1])
    mask, boxes = read_masks(row, size) if row.masks else (None, row.boxes)
    return Picture(pixels, torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), mask, size)


def _object_masks(row: Row, size: tuple[int, int]) -> _Masks:
    """Objects together, what is ignored and belongs to none, and the box of each object."""
    objects = [open_image(path, "L") > 127 for path in row.masks]
    shape = objects[0].shape
    together, boxes = np.zeros(shape, bool), []
    for one in objects:
        rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        if len(rows):
            down, right = size[0] / one.shape[0], size[1] / one.shape[1]
            edges = columns[0] * right, rows[0] * down, (columns[-1] + 1) * right, (rows[-1] + 1) * down
            boxes.append((float(edges[0]), float(edges[1]), float(edges[2]), float(edges[3])))
        together |= nearest(one, shape)
    mask = together.astype(np.uint8)
    if row.ignored:
        mask[nearest(open_image(row.ignored, "L") > 127, shape) & ~together] = IGNORED
    return mask, boxes


def _class_mask(row: Row, size: tuple[int, int]) -> _Masks:
    return class_indices(row.masks[0]), row.boxes


def class_indices(path: str) -> np.ndarray:
    """Read a mask of class indices.

    Args:
        path: an indexed or a grey image.

    Raises:
        ValueError: if it has colours instead of indices.
    """
    mask = open_image(path, None)
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"{path} must be an indexed (palette) or grey image of class indices, and has {mask.shape}")
    return mask


__all__ = [
    "FILE_SIZE",
    "Folders",
    "Row",
    "balanced",
    "class_indices",
    "drawn",
    "held_out",
    "open_image",
    "source_of_rows",
]
