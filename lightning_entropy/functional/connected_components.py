"""Connected components of masks, in torch on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def connected_components(masks: Tensor) -> Tensor:
    """Number the 8-connected components of masks.

    Each pixel takes the earliest pixel among its neighbours, and then the one that that pixel has taken, until nothing
    changes: the way doubles with each round, so that a spiral needs few.

    Args:
        masks: ``(B, H, W)`` bool.

    Returns:
        ``(B, H, W)`` int64: 0 outside, inside 1 plus the place of the component's first pixel in raster order.

    Raises:
        ValueError: if the masks are not three-dimensional bool.

    Example:
        >>> connected_components(torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 1]]]).bool())
        tensor([[[1, 0, 0, 4],
                 [0, 1, 0, 4]]])
    """
    if masks.dim() != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool (batch, height, width), got {masks.dtype} {tuple(masks.shape)}")
    if not masks.numel():
        return masks.long()
    count, height, width = masks.shape
    size = height * width
    # Largest first, since max_pool2d is there; float64 holds every index of an image.
    ids = torch.arange(size, 0, -1, device=masks.device, dtype=torch.float64).view(1, height, width)
    ids = ids.to(torch.float32) if size < 2**24 else ids
    label = torch.where(masks, ids, 0).expand(count, -1, -1)
    while True:
        spread = torch.where(masks, F.max_pool2d(label[:, None], 3, 1, 1)[:, 0], 0).flatten(1)
        followed = torch.where(masks.flatten(1), spread.gather(1, (size - spread.long()).clamp(max=size - 1)), 0)
        followed = followed.view_as(label)
        if torch.equal(followed, label):
            return torch.where(masks, size - label.long() + 1, 0)
        label = followed


def largest_component(masks: Tensor) -> Tensor:
    """The 8-connected component of the most pixels of each mask.

    Of several that are equally large, the one whose first pixel comes last in raster order, as in
    :func:`lightning_entropy.functional.boxes_at_thresholds`.

    Args:
        masks: ``(B, H, W)`` bool.

    Returns:
        ``(B, H, W)`` bool; empty where the mask is.

    Raises:
        ValueError: if the masks are not three-dimensional bool.

    Example:
        >>> largest_component(torch.tensor([[[1, 0, 1, 1]]]).bool())
        tensor([[[False, False,  True,  True]]])
    """
    labels = connected_components(masks)
    if not masks.numel():
        return masks
    flat, size = labels.flatten(1), labels[0].numel()
    pixels = torch.zeros(len(flat), size + 1, dtype=torch.long, device=flat.device)
    pixels.scatter_add_(1, flat, (flat > 0).long())
    rank = pixels * (size + 1) + torch.arange(size + 1, device=flat.device)
    best = rank.argmax(1)
    return masks & (labels == best[:, None, None])


__all__ = ["connected_components", "largest_component"]
