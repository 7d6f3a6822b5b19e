"""Where the two axes of the image are in a tensor of features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("channels first", "channels last", "tokens")


class MapLayout(NamedTuple):
    """How features hold a map: ``(B, C, H, W)``, ``(B, H, W, C)``, or ``(B, prefix + H * W, C)``.

    Args:
        kind: one of the three.
        prefix: tokens before the patches that are no part of the map (class, distillation, registers).

    Example:
        >>> MapLayout("tokens", 1).to_map(torch.zeros(2, 17, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    kind: str
    prefix: int = 0

    def to_map(self, features: Tensor) -> Tensor:
        """The map ``(B, C, H, W)``; patches are taken to form a square."""
        if self.kind == "channels first":
            return features
        if self.kind == "channels last":
            return features.permute(0, 3, 1, 2)
        patches = features[:, self.prefix :]
        side = math.isqrt(patches.shape[1])
        if side * side != patches.shape[1]:
            raise ValueError(
                f"{patches.shape[1]} patch tokens (after {self.prefix} others) do not form a square. Square images are "
                "needed where the features are tokens."
            )
        return patches.transpose(1, 2).unflatten(2, (side, side))

    def from_map(self, maps: Tensor, features: Tensor) -> Tensor:
        """Features that hold ``maps``; tokens that are no part of it are taken from ``features``."""
        if self.kind == "channels first":
            return maps
        if self.kind == "channels last":
            return maps.permute(0, 2, 3, 1)
        patches = maps.flatten(2).transpose(1, 2)
        return torch.cat([features[:, : self.prefix].to(patches.dtype), patches], 1) if self.prefix else patches


def layout_of(
    value: object, prefix: int | None = None, channels: int | None = None, *, aspect: float | None = None
) -> MapLayout | None:
    """How a tensor holds a map, from its shape; None if it holds none of at least two positions.

    Args:
        value: what a module takes or returns.
        prefix: how many tokens are no patches; None: those that are too many for a square.
        channels: how many channels the map has; None: not known.
        aspect: height over width of the images, which tells the two sides where the channels are not known; None:
            images are taken to be square.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if value.dim() == 4:
        first = value.shape[1] == channels if channels is not None else value.shape[2] == value.shape[3]
        last = value.shape[3] == channels if channels is not None else value.shape[1] == value.shape[2]
        if channels is None and aspect is not None:
            _, a, b, c = value.shape
            last = abs(a / b - aspect) < abs(b / c - aspect)
            first = not last
        if first or (channels is None and not last):
            return MapLayout("channels first") if value.shape[2] * value.shape[3] > 1 else None
        return MapLayout("channels last") if last and value.shape[1] * value.shape[2] > 1 else None
    if value.dim() == 3 and channels in (None, value.shape[2]):
        extra = value.shape[1] - math.isqrt(value.shape[1]) ** 2 if prefix is None else prefix
        patches = value.shape[1] - extra
        if patches > 1 and math.isqrt(patches) ** 2 == patches:
            return MapLayout("tokens", extra)
    return None


__all__ = ["KINDS", "MapLayout", "layout_of"]
