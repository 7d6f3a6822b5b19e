"""Tiny folders in the layouts that ``LocalizationSet`` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("001.Wren", "002.Crow")
SIDES = (40, 20)  # width and height


def picture(path: Path, seed: int = 0, sides: tuple[int, int] = SIDES) -> None:
    """Write an image without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (sides[1], sides[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")


def lines(path: Path, rows: Sequence[str]) -> None:
    """Write a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def wsolevaluation(
    images: Path, metadata: Path, *, count: int = 2, masks: bool = False, sides: tuple[int, int] = SIDES
) -> Mapping[str, list[str]]:
    """Two classes, ``count`` images of each in every split; boxes, or two masks and an ignored region an image."""
    names: dict[str, list[str]] = {}
    for split in ("train", "val", "test"):
        own = [f"{folder}/{split}{i}.jpg" for folder in CLASSES for i in range(count)]
        for i, name in enumerate(own):
            picture(images / name, seed=i, sides=sides)
        lines(metadata / split / "image_ids.txt", own)
        lines(metadata / split / "class_labels.txt", [f"{name},{i // count}" for i, name in enumerate(own)])
        lines(metadata / split / "image_sizes.txt", [f"{name},{SIDES[0]},{SIDES[1]}" for name in own])
        places = [f"{name},4,2,20,12" for name in own] + [f"{own[0]},30,10,40,20"]
        if masks:
            (metadata / split / "image_sizes.txt").write_text("")
            places = [] if split == "train" else [row for name in own for row in _masks(images, name)]
        lines(metadata / split / "localization.txt", places)
        names[split] = own
    return names


def _masks(images: Path, name: str) -> list[str]:
    stem = name.removesuffix(".jpg")
    parts = {
        "a": (slice(2, 12), slice(4, 20)),
        "b": (slice(10, 20), slice(30, 40)),
        "ignore": (slice(0, 5), slice(0, 8)),
    }
    for part, place in parts.items():
        mask = np.zeros((20, 40), np.uint8)
        mask[place] = 255
        Image.fromarray(mask).convert("1").save(images / f"{stem}_{part}.png")
    return [f"{name},{stem}_a.png,{stem}_ignore.png", f"{name},{stem}_b.png,"]


def cub(root: Path, *, count: int = 10) -> list[str]:
    """CUB_200_2011 with two classes and ``count`` images of each, every other of which trains."""
    names = [f"{folder}/{folder[4:]}_{i}.jpg" for folder in CLASSES for i in range(count)]
    for i, name in enumerate(names):
        picture(root / "images" / name, seed=i)
    lines(root / "classes.txt", [f"{i} {folder}" for i, folder in enumerate(CLASSES, 1)])
    lines(root / "images.txt", [f"{i} {name}" for i, name in enumerate(names, 1)])
    lines(root / "image_class_labels.txt", [f"{i} {1 + (i - 1) // count}" for i in range(1, len(names) + 1)])
    lines(root / "train_test_split.txt", [f"{i} {i % 2}" for i in range(1, len(names) + 1)])
    lines(root / "bounding_boxes.txt", [f"{i} 4.0 2.0 16.0 10.0" for i in range(1, len(names) + 1)])
    return names


def voc(root: Path, *, train: int = 10, val: int = 3) -> None:
    """VOC2012: a cat (rows 2 to 11, columns 4 to 19) in each image, and a person in every other."""
    lists = root / "ImageSets" / "Segmentation"
    lines(lists / "train.txt", [f"2007_{i:06d}" for i in range(train)])
    lines(lists / "val.txt", [f"2008_{i:06d}" for i in range(val)])
    for name in [*(f"2007_{i:06d}" for i in range(train)), *(f"2008_{i:06d}" for i in range(val))]:
        picture(root / "JPEGImages" / f"{name}.jpg", seed=int(name[5:]))
        person = int(name[5:]) % 2 == 0
        mask = np.zeros((20, 40), np.uint8)
        mask[2:12, 4:20] = 8
        if person:
            mask[10:20, 30:40] = 15
        mask[12, 4:20] = 255
        image = Image.fromarray(mask)
        image.putpalette(list(range(256)) * 3)
        (root / "SegmentationClass").mkdir(parents=True, exist_ok=True)
        image.save(root / "SegmentationClass" / f"{name}.png")
        objects = [("cat", 5, 3, 20, 12)] + ([("person", 31, 11, 40, 20)] if person else [])
        lines(root / "Annotations" / f"{name}.xml", [annotation(objects)])


def annotation(objects: Sequence[tuple[str, int, int, int, int]]) -> str:
    """VOC's XML: pixels are counted from 1, and the last one is part of the box."""
    found = "".join(
        f"<object><name>{name}</name><part><name>head</name></part><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1 in objects
    )
    return f"<annotation><size><width>40</width><height>20</height><depth>3</depth></size>{found}</annotation>"
