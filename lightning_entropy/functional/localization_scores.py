"""Scores of localization: overlap of boxes, and precision of pixels at every threshold.

Both follow the evaluator of Choe et al. (CVPR 2020) number for number. Counts are integers, so that they add up over
batches and processes without rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_entropy.functional.level_boxes import largest_at_each
from lightning_entropy.functional.localization_boxes import ThresholdBoxes, checked_score_maps, protocol_thresholds


def inclusive_box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    r"""Intersection over union of boxes whose corners are pixels inside them.

    A box ``x0, y0, x1, y1`` covers :math:`(x_1 - x_0 + 1)(y_1 - y_0 + 1)` pixels, and is never empty.

    Args:
        boxes: ``(..., 4)`` whole numbers.
        others: ``(..., 4)``, broadcast against ``boxes``.

    Returns:
        ``(...)``, float64.

    Example:
        >>> inclusive_box_iou(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 2, 1]))
        tensor(0.3333, dtype=torch.float64)
    """
    ax0, ay0, ax1, ay1 = boxes.long().unbind(-1)
    bx0, by0, bx1, by1 = others.long().unbind(-1)
    width = torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0) + 1
    height = torch.minimum(ay1, by1) - torch.maximum(ay0, by0) + 1
    both = width.clamp(min=0) * height.clamp(min=0)
    either = (ax1 - ax0 + 1) * (ay1 - ay0 + 1) + (bx1 - bx0 + 1) * (by1 - by0 + 1) - both
    return both.double() / either.double()


def best_iou_at_thresholds(found: ThresholdBoxes, truth: Sequence[Tensor], *, num_thresholds: int) -> Tensor:
    """Largest overlap between any box of a map and any true box of its image, at every threshold.

    Args:
        found: what `boxes_at_thresholds` returns.
        truth: for each map the true boxes ``(n, 4)``, whole pixels of the map, ``x0, y0, x1, y1`` inclusive, n >= 1.
        num_thresholds: number of thresholds.

    Returns:
        ``(len(truth), num_thresholds)``, float64, on the CPU.

    Raises:
        ValueError: if an image has no true box.

    Example:
        >>> from lightning_entropy.functional import boxes_at_thresholds
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 1:4] = 1
        >>> found = boxes_at_thresholds(maps, [0.5])
        >>> best_iou_at_thresholds(found, [torch.tensor([[1, 2, 4, 5]])], num_thresholds=1)
        tensor([[1.]], dtype=torch.float64)
    """
    for index, boxes in enumerate(truth):
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
            raise ValueError(f"truth[{index}] must hold boxes (n, 4) with n >= 1, got the shape {tuple(boxes.shape)}")
    iou = torch.zeros(len(found.boxes), dtype=torch.float64)
    most = max((len(boxes) for boxes in truth), default=0)
    for place in range(most):  # the first true box of every image, then the second ...
        has = torch.tensor([len(boxes) > place for boxes in truth])
        nth = torch.stack([boxes[min(place, len(boxes) - 1)].cpu() for boxes in truth])
        chosen = has[found.image].nonzero().flatten() if not bool(has.all()) else slice(None)
        of = found.image[chosen]
        iou[chosen] = torch.maximum(iou[chosen], inclusive_box_iou(found.boxes[chosen], nth[of]))
    best = largest_at_each(
        iou.numpy(),
        found.image.numpy(),
        found.first.numpy(),
        found.last.numpy() + 1,
        images=len(truth),
        steps=num_thresholds,
        floor=0,
    )
    return torch.from_numpy(best)


def score_histograms(maps: Tensor, masks: Tensor, *, interval: float = 0.001, normalize: bool = True) -> Tensor:
    """Histograms of the scores of object and of background pixels, pooled over the images.

    The bins are ``[0, interval), [interval, 2 interval), ..., [.., 1), [1, 2), [2, 3]``; the last one stays empty.

    Args:
        maps: ``(B, H, W)`` or ``(B, 1, H, W)``.
        masks: ``(B, H, W)`` or ``(B, 1, H, W)``, 1 for object and 0 for background; any other value is ignored (255 in
            the official masks).
        interval: width of a bin.
        normalize: scale each map to [0, 1]; otherwise it must be in [0, 1].

    Returns:
        ``(2, bins)`` int64, object pixels first, on the device of the maps.

    Raises:
        ValueError: if the shapes differ, or maps are not as above.

    Example:
        >>> score_histograms(torch.tensor([[[0.0, 0.3], [0.8, 1.0]]]), torch.tensor([[[0, 0], [1, 1]]]), interval=0.5)
        tensor([[0, 1, 1, 0],
                [2, 0, 0, 0]])
    """
    scores = checked_score_maps(maps, normalize=normalize)
    masks = masks[:, 0] if masks.ndim == 4 and masks.shape[1] == 1 else masks
    if masks.shape != scores.shape:
        raise ValueError(f"masks must have the shape of the maps, {tuple(scores.shape)}, got {tuple(masks.shape)}")
    masks = masks.to(scores.device)
    edges = torch.from_numpy(np.append(protocol_thresholds(interval), [1.0, 2.0])).to(scores.device)
    bins = torch.searchsorted(edges, scores, right=True) - 1
    known = (masks == 1) | (masks == 0)
    place = bins[known] + len(edges) * (masks[known] == 0)
    return torch.bincount(place, minlength=2 * len(edges)).view(2, len(edges))


def pixel_precision_recall(histograms: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of the pixels whose score lies in a bin or above.

    Args:
        histograms: ``(2, bins)``, what `score_histograms` returns, added up over batches.

    Returns:
        Precision and recall, each ``(bins,)`` float64, from the highest bin to the lowest; a precision of 1 where no
        pixel is as high.

    Raises:
        ValueError: if there is no object pixel.
    """
    true, false = histograms.cpu().flip(-1).cumsum(-1).double()
    if not true[-1] > 0:
        raise ValueError(f"no pixel belongs to an object, of {int(false[-1])} pixels; masks must be 1 on objects")
    predicted = true + false
    return torch.where(predicted > 0, true / predicted.clamp(min=1), 1.0), true / true[-1]


def pixel_average_precision(histograms: Tensor) -> Tensor:
    r"""Area under the precision-recall curve of pixels, PxAP.

    .. math:: \sum_i p_i (r_i - r_{i-1})

    over the bins from high to low: steps, no interpolation. The pixels of all images are one pool. It is the share of
    object pixels for a constant map, and 1 for a map that is the mask itself.

    Args:
        histograms: ``(2, bins)``, what `score_histograms` returns, added up over batches.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        ValueError: if there is no object pixel.

    Reference:
        Choe et al., Evaluating Weakly Supervised Object Localization Methods Right, CVPR 2020, arXiv 2001.07437.

    Example:
        >>> pixel_average_precision(torch.tensor([[0, 0, 3, 0], [1, 0, 0, 0]]))
        tensor(1., dtype=torch.float64)
    """
    precision, recall = pixel_precision_recall(histograms)
    return (precision[1:] * recall.diff()).sum()


__all__ = [
    "best_iou_at_thresholds",
    "inclusive_box_iou",
    "pixel_average_precision",
    "pixel_precision_recall",
    "score_histograms",
]
