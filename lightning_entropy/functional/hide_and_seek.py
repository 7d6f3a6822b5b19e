"""Hide-and-Seek: patches of the training images are hidden, so that no single part of an object suffices."""

from __future__ import annotations

import torch
from torch import Tensor


def hide_and_seek(
    images: Tensor,
    *,
    grid: int | tuple[int, int] = 4,
    p: float = 0.5,
    fill: float | Tensor = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide each patch of a grid with probability p, independently in each image.

    The hidden pixels get the mean of the training images, so that the activations of a filter over them have the
    expectation that they have over a whole image; of normalised images that is 0. Evaluate with whole images.

    Args:
        images: ``(B, C, H, W)``.
        grid: patches down and across, or one number for both; sides that they do not divide give patches that differ
            by a pixel. The paper draws the size of a patch from 16, 32, 44 and 56 of 224 pixels.
        p: probability that a patch is hidden.
        fill: what hidden pixels get, one number or one for each channel ``(C,)``.
        generator: of the draws, on the CPU; None takes torch's.

    Returns:
        New images, ``(B, C, H, W)``.

    Raises:
        ValueError: if p is outside [0, 1], or the grid is below 1 or finer than the image.

    Reference:
        Hide-and-Seek, arXiv 1704.04232.

    Example:
        >>> images = hide_and_seek(torch.ones(1, 1, 4, 4), grid=2, generator=torch.Generator().manual_seed(1))
        >>> images[0, 0]
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.],
                [0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """
    if images.dim() != 4:
        raise ValueError(f"images must be (batch, channels, height, width), got {tuple(images.shape)}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    height, width = images.shape[-2:]
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(f"grid must be from 1 to the image's {height} x {width}, got {rows} x {columns}")
    hidden = torch.rand(len(images), rows, columns, generator=generator, device="cpu") < p
    y, x = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    pixels = hidden[:, y][:, :, x][:, None].to(images.device)
    value = torch.as_tensor(fill, dtype=images.dtype, device=images.device)
    return torch.where(pixels, value.view(1, -1, 1, 1), images)


__all__ = ["hide_and_seek"]
