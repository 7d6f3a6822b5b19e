"""Files of localizations: boxes in COCO's format, pictures, masks. Each is whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_entropy.localization.localization_figure import Boxes, draw_localization
from lightning_entropy.localization.pseudo_masks import write_voc_mask
from lightning_entropy.training.figures import close_figure, write_figure
from lightning_entropy.training.files import atomic_write


def write_coco(localizations: dict[str, Any] | list[dict[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Write a COCO data set, or the list of its results, as JSON.

    Args:
        localizations: of :func:`lightning_entropy.localization.localizations_to_coco` or ``coco_results``.
        path: the file.

    Returns:
        The path that was written.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(localizations, file, allow_nan=False)
        file.write("\n")
    return Path(path)


def write_overlays(
    folder: str | os.PathLike[str],
    names: Sequence[str],
    images: Tensor,
    maps: Tensor,
    boxes: Sequence[Tensor] | None = None,
    truth: Sequence[Tensor] | None = None,
    *,
    masks: Tensor | None = None,
) -> list[Path]:
    """Write one picture an image: the image, its map, its boxes and the true ones.

    Args:
        folder: where they go; the name of an image, without its folders and suffix, is that of its picture.
        names: of the images; two that differ in their folders alone are an error.
        images: ``(B, 3, H, W)`` in [0, 1].
        maps: ``(B, 1, h, w)`` or ``(B, h, w)``.
        boxes: see :func:`lightning_entropy.localization.draw_localization`.
        truth: likewise.
        masks: likewise.

    Returns:
        The files.

    Raises:
        ValueError: if two images have one name.
    """
    targets = [Path(folder, f"{Path(name).stem}.png") for name in names]
    twice = sorted({t.name for t in targets if targets.count(t) > 1})
    if twice:
        raise ValueError(f"several images would be written to {', '.join(twice[:3])}: give them distinct names")

    def of(boxes: Boxes, index: int) -> Boxes:
        return None if boxes is None else boxes[index]

    for index, target in enumerate(targets):
        mask = None if masks is None else masks[index]
        figure = draw_localization(images[index], maps[index], of(boxes, index), of(truth, index), masks=mask)
        write_figure(figure, target)
        close_figure(figure)
    return targets


def write_masks(folder: str | os.PathLike[str], names: Sequence[str], masks: Tensor) -> list[Path]:
    """Write masks as indexed PNG in VOC's palette, named as their images.

    Args:
        folder: where they go.
        names: of the images.
        masks: ``(B, H, W)`` uint8.

    Returns:
        The files.
    """
    return [write_voc_mask(Path(folder, f"{Path(n).stem}.png"), mask) for n, mask in zip(names, masks, strict=True)]


__all__ = ["write_coco", "write_masks", "write_overlays"]
