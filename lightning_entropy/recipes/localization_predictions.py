"""Classes, boxes and pictures of images that a localizer has not been trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_entropy.localization import localizations_to_coco, map_boxes
from lightning_entropy.recipes.from_data import datamodule_of
from lightning_entropy.recipes.localization_files import write_coco, write_overlays
from lightning_entropy.recipes.predictions import write_predictions

if TYPE_CHECKING:
    from lightning_entropy.recipes.wsol import ImageLocalizer

_RESIZE, _CROP = 256, 224  # of LocalizationSet(evaluation="centre_crop")


def in_original(boxes: Tensor, *, shown: tuple[int, int], size: tuple[int, int], centre_crop: bool = False) -> Tensor:
    """Boxes in pixels of the image that the model was not given, but was made from.

    Args:
        boxes: ``(n, 4)`` in pixels of what the model was given.
        shown: height and width of that.
        size: height and width of the original.
        centre_crop: whether the model was given the centre of the resized image, 224 pixels out of 256.

    Returns:
        ``(n, 4)`` float32.

    Example:
        >>> in_original(torch.tensor([[0.0, 8.0, 16.0, 16.0]]), shown=(16, 16), size=(32, 160))
        tensor([[  0.,  16., 160.,  32.]])
    """
    height, width = (round(side * _RESIZE / _CROP) if centre_crop else side for side in shown)
    corner = torch.tensor([(width - shown[1]) // 2, (height - shown[0]) // 2] * 2)
    scale = torch.tensor([size[1] / width, size[0] / height] * 2, dtype=torch.float64)
    return ((boxes + corner) * scale).float()


def predicted_batch(module: ImageLocalizer, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What ``predict_step`` returns; see :meth:`~lightning_entropy.recipes.wsol.ImageLocalizer.predict_step`."""
    images: Tensor = batch["image"]
    logits = module(images).float()
    name = module.chosen_map()
    maps = module.score_maps(images, labels=logits.argmax(1), names=[name])[name].cpu()
    found = map_boxes(maps, threshold=module.threshold(name), contours=module.contours)
    height, width = int(images.shape[2]), int(images.shape[3])
    sizes = batch["size"].cpu() if "size" in batch else torch.tensor([[height, width]] * len(images))
    centre_crop = getattr(datamodule_of(module), "evaluation", None) == "centre_crop"
    result = {
        "name": list(batch["name"]),
        "probabilities": logits.softmax(dim=-1).cpu(),
        "boxes": [
            in_original(boxes, shown=(height, width), size=(int(h), int(w)), centre_crop=centre_crop)
            for boxes, (h, w) in zip(found, sizes.tolist())
        ],
        "size": sizes,
    }
    count = min(len(images), module.overlays_left)
    module.overlays_left -= count
    if count:
        result["pictures"] = {
            "name": result["name"][:count],
            "images": module.shown(images[:count]).cpu(),
            "maps": maps[:count],
            "boxes": found[:count],
            "truth": [boxes.cpu() for boxes in batch["boxes"][:count]] if "boxes" in batch else None,
        }
    return result


def write_localizations(
    predictions: Sequence[dict[str, Any]], path: str | os.PathLike[str], *, classes: Sequence[str] | None = None
) -> list[Path]:
    """Write a table of classes, boxes in the format of COCO, and pictures.

    With several processes all of them must call this; the first writes boxes, each its own pictures.

    Args:
        predictions: what ``Trainer.predict`` returned for an :class:`~lightning_entropy.ImageLocalizer`.
        path: the CSV file ``STEM.csv``; boxes go into ``STEM.json`` beside it, pictures into the folder ``STEM``.
        classes: names of the classes; their numbers if None.

    Returns:
        What was written, the pictures as their folder.

    Raises:
        ValueError: if there is no prediction.
    """
    table = write_predictions(predictions, path, classes=classes)
    rows = {
        name: (boxes, probabilities, (int(size[0]), int(size[1])))
        for batch in predictions
        for name, boxes, probabilities, size in zip(
            batch["name"], batch["boxes"], batch["probabilities"].tolist(), batch["size"].tolist()
        )
    }
    first = True
    if dist.is_available() and dist.is_initialized():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, rows)
        rows = {name: row for part in gathered for name, row in part.items()}
        first = dist.get_rank() == 0
    written = [table]
    if first:
        ordered = dict(sorted(rows.items()))
        found = [row[0] for row in ordered.values()]
        probabilities = torch.tensor([row[1] for row in ordered.values()])
        sizes = [row[2] for row in ordered.values()]
        names = [str(name) for name in classes or range(probabilities.shape[1])]
        scores, labels = probabilities.max(1)
        coco = localizations_to_coco(list(ordered), found, labels, sizes=sizes, scores=scores, classes=names)
        written.append(write_coco(coco, table.with_suffix(".json")))
    folder = table.with_suffix("")
    for pictures in (batch["pictures"] for batch in predictions if "pictures" in batch):
        shown = (pictures[key] for key in ("name", "images", "maps", "boxes", "truth"))
        write_overlays(folder, *shown)
        written = [*written, folder] if folder not in written else written
    return written


__all__ = ["in_original", "predicted_batch", "write_localizations"]
