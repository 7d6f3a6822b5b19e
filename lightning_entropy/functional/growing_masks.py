"""Nested masks that grow over the positions of a map, position by position."""

from __future__ import annotations

import torch
from torch import Tensor


def growth_order(inside: Tensor) -> Tensor:
    """The order in which a mask takes the positions when it grows from the middle of an object to the whole map.

    Inside, the positions farthest from the outside come first; outside, those nearest to the object. Where nothing
    lies outside, those nearest to the middle come first.

    Args:
        inside: the object, ``(H, W)`` bool.

    Returns:
        ``(H, W)`` int64, 0 for the first position.

    Raises:
        ValueError: if it is no two-dimensional bool with a position inside.

    Example:
        >>> growth_order(torch.tensor([[False, True, True, True, False, False]]))
        tensor([[3, 1, 0, 2, 4, 5]])
    """
    if inside.dim() != 2 or inside.dtype != torch.bool or not bool(inside.any()):
        raise ValueError(
            f"inside must be bool (height, width) with at least one position, got {inside.dtype} {tuple(inside.shape)}"
        )
    height, width = inside.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows, columns], -1).view(-1, 2).double()
    held = inside.flatten().cpu()
    distance = torch.zeros(len(place), dtype=torch.float64)
    if bool(held.all()):
        middle = torch.tensor([height - 1, width - 1], dtype=torch.float64) / 2
        distance = (place - middle).norm(dim=1)
    else:
        between = torch.cdist(place[held], place[~held])
        distance[held] = -between.amin(1)
        distance[~held] = between.amin(0)
    return order_of(-distance.view(height, width)).to(inside.device)


def order_of(scores: Tensor) -> Tensor:
    """The rank of each position, the largest score first; of equal ones the first in raster order.

    Args:
        scores: ``(..., H, W)``.

    Returns:
        ``(..., H, W)`` int64, 0 for the largest.

    Example:
        >>> order_of(torch.tensor([[0.1, 0.9, 0.5]]))
        tensor([[2, 0, 1]])
    """
    order = scores.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return ranks.view(scores.shape)


__all__ = ["growth_order", "order_of"]
