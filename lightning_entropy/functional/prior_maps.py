r"""Score maps that look at no image, against which a localizer is to be measured.

Objects of most data sets are large and central, so both score well there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def centre_gaussian(height: int, width: int, *, sigma: float = 0.25) -> Tensor:
    r"""A Gaussian in the middle.

    .. math:: e^{-\frac12 \left( (x / \sigma W)^2 + (y / \sigma H)^2 \right)}

    with x and y from the centre. Its level sets are the same ellipses for every sigma, so boxes at a threshold that is
    fitted do not depend on it.

    Args:
        height: of the map.
        width: of the map.
        sigma: standard deviation as a share of each side.

    Returns:
        ``(height, width)`` float32, at most 1.

    Raises:
        ValueError: if a side is below 1 or sigma not positive.

    Example:
        >>> centre_gaussian(1, 3)
        tensor([[0.4111, 1.0000, 0.4111]])
    """
    _check(height, width, 1)
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma must be finite and positive, got {sigma}")
    y, x = ((torch.arange(n) - (n - 1) / 2) / (sigma * n) for n in (height, width))  # symmetric to the last bit
    return torch.exp(-0.5 * (y[:, None] ** 2 + x[None] ** 2))


def whole_image(height: int, width: int) -> Tensor:
    """A map whose box is the whole image at every threshold.

    It is 1, but for a 0 in the upper left corner: the published protocol takes a constant map for an empty one.

    Args:
        height: of the map.
        width: of the map.

    Returns:
        ``(height, width)`` float32.

    Raises:
        ValueError: if a side is below 2.

    Example:
        >>> from lightning_entropy.functional import boxes_at_thresholds
        >>> boxes_at_thresholds(whole_image(6, 8)[None], [0.0, 0.9]).boxes
        tensor([[0, 0, 7, 5]])
    """
    _check(height, width, 2)
    maps = torch.ones(height, width)
    maps[0, 0] = 0
    return maps


def _check(height: int, width: int, least: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


__all__ = ["centre_gaussian", "whole_image"]
