"""PASCAL VOC as it is published: several classes an image, boxes in XML, masks of class indices."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from lightning_entropy.data.localization_picture import IGNORED
from lightning_entropy.data.localization_rows import Folders, Row, class_indices, held_out
from lightning_entropy.data.problems import Problems

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_YEARS = ("", "VOC2012", "VOCdevkit/VOC2012")  # below the folder that is given
_AUGMENTED = ("train_aug.txt", "trainaug.txt")  # the usual names of the 10,582 images with SBD's masks
_MASKS = ("SegmentationClass", "SegmentationClassAug")
_VAL_SHARE = 0.1


def read_voc(root: Path, *, val_count: int | None, seed: int) -> list[Row]:
    """Read the images of ``ImageSets/Segmentation``.

    VOC's own validation images test here, as their numbers are what is reported. Validation, which may choose a
    threshold, takes training images with a mask: a tenth, or ``val_count``.

    Args:
        root: ``VOC2012``, or a folder that holds it or ``VOCdevkit/VOC2012``. Where its lists have ``train_aug.txt``,
            that trains instead of ``train.txt``.
        val_count: number of training images for validation.
        seed: of choosing them.

    Returns:
        The images; labels are those of the XML, or of the mask where there is no XML.

    Raises:
        ValueError: with the file and line of all that is wrong.
    """
    found = [root / year for year in _YEARS if (root / year / "ImageSets" / "Segmentation").is_dir()]
    if not found:
        raise ValueError(f"{root} must be a VOC2012 folder, with ImageSets/Segmentation, JPEGImages and Annotations")
    voc, problems, folders = found[0], Problems(str(found[0])), Folders()
    lists = voc / "ImageSets" / "Segmentation"
    augmented = [lists / name for name in _AUGMENTED if (lists / name).is_file()]
    rows: list[Row] = []
    for split, file in (("train", augmented[0] if augmented else lists / "train.txt"), ("test", lists / "val.txt")):
        if not file.is_file():
            problems.add(f"{file} does not exist")
            continue
        for line, name in _names(file):
            where = f"{file}, line {line}"
            if not folders.has(str(voc / "JPEGImages"), f"{name}.jpg"):
                problems.add(f"{where}: there is no image {voc / 'JPEGImages' / name}.jpg")
                continue
            try:
                rows.append(_row(voc, name, split, folders))
            except ValueError as error:
                problems.add(f"{where}: {error}")
    problems.raise_any()
    twice = {row.name for row in rows if row.split == "train"} & {row.name for row in rows if row.split == "test"}
    if twice:
        raise ValueError(f"{lists}: {len(twice)} images train and test, as {min(twice)}")
    masked = sum(row.split == "train" and bool(row.masks) for row in rows)
    count = round(_VAL_SHARE * masked) if val_count is None else val_count
    if count > masked:
        raise ValueError(f"val_count is {count:,}, and {masked:,} training images have a mask")
    return held_out(rows, count, seed=seed, among=lambda row: bool(row.masks))


def _names(file: Path) -> list[tuple[int, str]]:
    """Names of images; lists of SBD's images have paths (``/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png``)."""
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    return [(line, Path(text.split()[0]).stem) for line, text in lines if text.strip()]


def _row(voc: Path, name: str, split: str, folders: Folders) -> Row:
    masks = [str(voc / folder / f"{name}.png") for folder in _MASKS if folders.has(str(voc / folder), f"{name}.png")]
    if split == "test" and not masks:
        raise ValueError(f"there is no mask {voc / _MASKS[0] / name}.png")
    if folders.has(str(voc / "Annotations"), f"{name}.xml"):
        labels, boxes, size = _annotation(voc / "Annotations" / f"{name}.xml")
    elif masks:
        labels, boxes, size = _classes_of(masks[0]), (), None
    else:
        raise ValueError(f"{name} has neither Annotations/{name}.xml nor a mask, so that its classes are not known")
    return Row(str(voc / "JPEGImages"), f"{name}.jpg", split, labels, boxes, size, tuple(masks[:1]))


_Boxes = tuple[tuple[float, float, float, float], ...]


def _annotation(path: Path) -> tuple[tuple[int, ...], _Boxes, tuple[int, int] | None]:
    """Classes, boxes (VOC counts pixels from 1 and includes the last one) and size."""
    try:
        tree = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no XML: {error}") from error
    labels, boxes = set(), []
    for item in tree.iter("object"):
        name = (item.findtext("name") or "").strip()
        if name not in VOC_CLASSES:
            raise ValueError(f"{path}: {name!r} is none of VOC's classes: {', '.join(VOC_CLASSES)}")
        labels.add(VOC_CLASSES.index(name))
        try:
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{key}") or "") for key in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError as error:
            raise ValueError(f"{path}: a {name} has no bndbox of xmin, ymin, xmax and ymax in numbers") from error
        boxes.append((x0 - 1, y0 - 1, x1, y1))
    sides = [(tree.findtext(f"size/{key}") or "").strip() for key in ("height", "width")]
    size = (int(sides[0]), int(sides[1])) if all(side.isdecimal() and int(side) for side in sides) else None
    return tuple(sorted(labels)), tuple(boxes), size


def _classes_of(mask: str) -> tuple[int, ...]:
    found = [int(value) for value in np.unique(class_indices(mask)) if value not in (0, IGNORED)]
    if found and found[-1] > len(VOC_CLASSES):
        raise ValueError(f"{mask} has the index {found[-1]}, and there are {len(VOC_CLASSES)} classes")
    return tuple(value - 1 for value in found)


__all__ = ["VOC_CLASSES", "read_voc"]
