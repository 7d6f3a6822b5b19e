"""Localizations as a data set in the format of COCO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Sizes = Tensor | Sequence[tuple[int, int]]


def localizations_to_coco(
    names: Sequence[str],
    boxes: Sequence[Tensor],
    labels: Tensor | Sequence[int],
    *,
    sizes: Sizes,
    scores: Tensor | Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    masks: Tensor | None = None,
    from_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Boxes of images as COCO's ``images``, ``annotations`` and ``categories``.

    An annotation has the fields of both formats of COCO: those of true objects (``id``, ``area``, ``iscrowd``) and
    ``score``, so that :func:`coco_results` is a part of it.

    Args:
        names: file names of the images.
        boxes: for each image ``(n, 4)``, ``x0, y0, x1, y1`` with exclusive right and lower edges.
        labels: the class of each image's boxes, from 0; categories count from 1, as is usual.
        sizes: height and width of each image, ``(B, 2)``.
        scores: one an image, the probability of its class; None: 1.
        classes: their names; None: ``"0"``, ``"1"``, ... up to the largest label.
        masks: ``(B, H, W)`` bool, written as run lengths (``segmentation``); one box an image then. At the size of the
            image, or of ``from_size`` to be resized by nearest pixel.
        from_size: height and width of the pictures in which the boxes are, if not the images' own; boxes are scaled.

    Returns:
        A dictionary for JSON.

    Raises:
        ValueError: if lengths do not fit, or a label has no name.

    Example:
        >>> coco = localizations_to_coco(["a.jpg"], [torch.tensor([[2, 3, 10, 7]])], [0], sizes=[(20, 30)])
        >>> coco["annotations"][0]["bbox"], coco["images"]
        ([2.0, 3.0, 8.0, 4.0], [{'id': 1, 'file_name': 'a.jpg', 'height': 20, 'width': 30}])
    """
    count = len(names)
    numbers = [int(label) for label in labels]
    extents = [(int(size[0]), int(size[1])) for size in sizes]
    certainties = [1.0] * count if scores is None else [float(score) for score in scores]
    given = {"boxes": len(boxes), "labels": len(numbers), "sizes": len(extents), "scores": len(certainties)}
    given |= {} if masks is None else {"masks": len(masks)}
    wrong = ", ".join(f"{n} {name}" for name, n in given.items() if n != count)
    if wrong:
        raise ValueError(f"there are {count} names and {wrong}")
    known = [str(i) for i in range(max(numbers, default=-1) + 1)] if classes is None else list(classes)
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(known):
        raise ValueError(f"labels must be 0 to {len(known) - 1}, got {min(numbers)} to {max(numbers)}")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, (name, (height, width)) in enumerate(zip(names, extents)):
        images.append({"id": index + 1, "file_name": str(name), "height": height, "width": width})
        found = boxes[index].reshape(-1, 4).detach().double().cpu()
        if from_size is not None:
            scale = torch.tensor([width / from_size[1], height / from_size[0]] * 2, dtype=torch.float64)
            found = found * scale
        if masks is not None and len(found) != 1:
            raise ValueError(f"{name} has {len(found)} boxes and a mask; masks go with one box an image")
        for x0, y0, x1, y1 in found.tolist():
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": index + 1,
                "category_id": numbers[index] + 1,
                "bbox": [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)],
                "area": round((x1 - x0) * (y1 - y0), 3),
                "iscrowd": 0,
                "score": certainties[index],
            }
            if masks is not None:
                mask = _resized(masks[index], (height, width))
                annotation |= {"segmentation": run_lengths(mask), "area": int(mask.sum())}
            annotations.append(annotation)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(known)]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco_results(coco: dict[str, Any]) -> list[dict[str, Any]]:
    """The list that COCO's evaluators take as results.

    Args:
        coco: what :func:`localizations_to_coco` made.
    """
    kept = ("image_id", "category_id", "bbox", "segmentation", "score")
    return [{key: one[key] for key in kept if key in one} for one in coco["annotations"]]


def run_lengths(mask: Tensor) -> dict[str, Any]:
    """A mask as COCO's uncompressed run lengths: down the columns, zeros first.

    Args:
        mask: ``(H, W)`` bool.

    Example:
        >>> run_lengths(torch.tensor([[True, False], [True, True]]))
        {'counts': [0, 2, 1, 1], 'size': [2, 2]}
    """
    flat = mask.bool().t().flatten().cpu()
    changes = (flat[1:] != flat[:-1]).nonzero().flatten() + 1
    edges = torch.cat([torch.tensor([0]), changes, torch.tensor([len(flat)])])
    counts = edges.diff().tolist()
    return {"counts": [0, *counts] if len(flat) and bool(flat[0]) else counts, "size": list(mask.shape)}


def _resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = ((torch.arange(n) + 0.5) * m / n for n, m in zip(size, mask.shape))
    return mask.cpu().bool()[rows.long()][:, columns.long()]


__all__ = ["coco_results", "localizations_to_coco", "run_lengths"]
