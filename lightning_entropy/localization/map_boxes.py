"""Boxes and masks of score maps at one threshold: what a localizer answers, as the metrics would judge it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_entropy.functional.connected_components import largest_component
from lightning_entropy.functional.localization_boxes import (
    CONTOURS,
    Contours,
    boxes_at_thresholds,
    checked_score_maps,
)


def map_boxes(
    maps: Tensor,
    *,
    threshold: float,
    size: tuple[int, int] | None = None,
    contours: Contours = "largest_component",
    normalize: bool = True,
) -> list[Tensor]:
    """Boxes of what lies above a threshold.

    The foreground is that of the metrics at this threshold: the map, resized, is scaled to [0, 1] and rounded down to
    256 levels. The metrics clip right and lower edges to the last pixel, as the published evaluator does; here they
    are not clipped, so that a box covers its pixels exactly. An empty foreground has no box.

    Args:
        maps: ``(B, h, w)`` or ``(B, 1, h, w)``.
        threshold: in [0, 1), for instance what ``fit_threshold`` of a metric returns.
        size: height and width to which maps are resized first (bilinear); None leaves them.
        contours: ``"largest_component"`` or ``"largest"``, one box an image; ``"all"``. See
            :func:`lightning_entropy.functional.boxes_at_thresholds`.
        normalize: scale each map to [0, 1]; otherwise it must be in [0, 1] already.

    Returns:
        For each map its boxes ``(n, 4)`` float32 on the CPU: ``x0, y0, x1, y1``, right and lower edges exclusive.

    Raises:
        ValueError: if the threshold is outside [0, 1), or maps are not as above.

    Example:
        >>> maps = torch.zeros(2, 8, 8)
        >>> maps[0, 2:5, 6:8] = 1
        >>> map_boxes(maps, threshold=0.5)
        [tensor([[6., 2., 8., 5.]]), tensor([], size=(0, 4))]
    """
    scaled = _scaled(maps, threshold, size, normalize)
    # A margin of background to the right and below moves the last pixel, to which the protocol clips, behind the map.
    found = boxes_at_thresholds(F.pad(scaled, (0, 1, 0, 1)), [threshold], contours=contours, normalize=False)
    boxes = [found.at(i, 0) for i in range(len(scaled))]
    return [b[(b[:, 2:] > 0).all(1)].float() for b in boxes]


def map_masks(
    maps: Tensor,
    *,
    threshold: float,
    size: tuple[int, int] | None = None,
    contours: Contours = "all",
    normalize: bool = True,
) -> Tensor:
    """What lies above a threshold, as masks.

    Args:
        maps: ``(B, h, w)`` or ``(B, 1, h, w)``.
        threshold: in [0, 1).
        size: height and width to which maps are resized first (bilinear); None leaves them.
        contours: ``"all"`` of the foreground, or its ``"largest_component"``.
        normalize: scale each map to [0, 1]; otherwise it must be in [0, 1] already.

    Returns:
        ``(B, H, W)`` bool.

    Raises:
        ValueError: if an argument is not as above.

    Example:
        >>> map_masks(torch.tensor([[[0.0, 0.9, 0.2, 1.0]]]), threshold=0.5)
        tensor([[[False,  True, False,  True]]])
    """
    if contours not in ("all", "largest_component"):
        raise ValueError(f"contours of masks must be 'all' or 'largest_component', got {contours!r}")
    scaled = _scaled(maps, threshold, size, normalize)
    levels = (scaled * 255).to(torch.uint8)  # truncates, as the protocol does
    cut = (levels.flatten(1).amax(1).double() * threshold).long() if len(levels) else levels.new_zeros(0)
    masks = levels > cut[:, None, None]
    return largest_component(masks) if contours == "largest_component" else masks


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps at another size, bilinear between the centres of their pixels; this is done before a map is scaled.

    Args:
        maps: ``(B, h, w)`` or ``(B, C, h, w)``.
        size: height and width.

    Returns:
        ``(B, H, W)`` or ``(B, C, H, W)``.
    """
    if maps.dim() == 3:
        return resize_maps(maps[:, None], size)[:, 0]
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _scaled(maps: Tensor, threshold: float, size: tuple[int, int] | None, normalize: bool) -> Tensor:
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    return checked_score_maps(maps if size is None else resize_maps(maps, size), normalize=normalize)


__all__ = ["CONTOURS", "map_boxes", "map_masks", "resize_maps"]
