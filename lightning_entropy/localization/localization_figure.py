"""The picture of a localization: image, map over it, boxes, truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_entropy.localization.map_boxes import resize_maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Boxes = Tensor | Sequence[Tensor] | None

FOUND, TRUE = "#ff5722", "white"  # each on a black halo, and away from the colours of the map


def draw_localization(
    images: Tensor,
    maps: Tensor,
    boxes: Boxes = None,
    truth: Boxes = None,
    *,
    masks: Tensor | None = None,
    titles: Sequence[str] | None = None,
    opacity: float = 0.5,
    columns: int = 4,
) -> Figure:
    """Images, each beside its map, with the boxes found (orange, dashed) and the true ones (white).

    Args:
        images: ``(3, H, W)``, or several ``(B, 3, H, W)``, in [0, 1]; one channel is drawn grey. Undo a normalisation
            first.
        maps: ``(h, w)``, or ``(B, h, w)`` or ``(B, 1, h, w)``; stretched over the image and scaled to [0, 1] each.
        boxes: what was found, ``(n, 4)`` pixels of the image, ``x0, y0, x1, y1`` with exclusive right and lower edges;
            for several images one tensor an image, or ``(B, 4)``.
        truth: likewise.
        masks: true masks ``(H, W)`` or ``(B, H, W)``, whose outline is drawn; 1 is the object.
        titles: one an image.
        opacity: of the map over the image.
        columns: pairs of pictures in a row.

    Returns:
        A figure without pyplot; ``training.log_figure`` hands it to a logger.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> figure = draw_localization(torch.rand(3, 32, 32), torch.rand(4, 4), torch.tensor([[4, 4, 20, 24]]))
        >>> len(figure.axes)
        2
    """
    from matplotlib.figure import Figure

    if images.dim() == 3:
        images, maps = images[None], maps.reshape(1, *maps.shape[-2:])
        boxes, truth = (None if b is None else [_single(b)] for b in (boxes, truth))
        masks = None if masks is None else masks.reshape(1, *masks.shape[-2:])
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (3, H, W) or (B, 3, H, W), got {tuple(images.shape)}")
    count, size = len(images), (int(images.shape[2]), int(images.shape[3]))
    maps = maps[:, 0] if maps.dim() == 4 and maps.shape[1] == 1 else maps
    if maps.dim() != 3 or len(maps) != count:
        raise ValueError(f"maps must be one an image, (B, h, w) for {count} images, got {tuple(maps.shape)}")
    found, true = _one_each(boxes, count, "boxes"), _one_each(truth, count, "truth")
    over = resize_maps(maps.detach().float().cpu(), size)
    pixels = images.detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1)
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    aspect = size[0] / size[1]
    figure = Figure(figsize=(3.2 * columns, max(1.0, 1.6 * aspect + 0.25) * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False).reshape(-1)
    for index in range(count):
        plain, mapped = axes[2 * index], axes[2 * index + 1]
        for axis in (plain, mapped):
            axis.imshow(pixels[index].numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, size[1], size[0], 0))
            if masks is not None:
                outline = (masks[index] == 1).float().cpu().numpy()
                if 0 < outline.mean() < 1:
                    x, y = torch.arange(size[1]) + 0.5, torch.arange(size[0]) + 0.5
                    axis.contour(x.numpy(), y.numpy(), outline, levels=[0.5], colors=TRUE, linewidths=0.8)
            _rectangles(axis, true[index], TRUE, "-")
            _rectangles(axis, found[index], FOUND, "--")
        mapped.imshow(over[index].numpy(), cmap="viridis", alpha=opacity, extent=(0, size[1], size[0], 0))
        if titles is not None:
            plain.set_title(titles[index], fontsize="small", loc="left")
    for axis in axes:
        axis.set_axis_off()
    for axis in axes[2 * count :]:
        axis.remove()
    return figure


def _single(boxes: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(boxes, Tensor):
        return boxes.reshape(-1, 4)
    if len(boxes) != 1:
        raise ValueError(f"boxes of one image must be (n, 4), got a list of {len(boxes)}")
    return boxes[0]


def _one_each(boxes: Boxes, count: int, name: str) -> list[Tensor]:
    each = [torch.zeros(0, 4)] * count if boxes is None else [b.reshape(-1, 4).detach().cpu() for b in boxes]
    if len(each) != count:
        raise ValueError(f"{name} must be one tensor (n, 4) an image, got {len(each)} for {count} images")
    return each


def _rectangles(axis: Axes, boxes: Tensor, colour: str, style: str) -> None:
    from matplotlib.patches import Rectangle

    for x0, y0, x1, y1 in boxes.double().tolist():
        corner, sides = (x0, y0), (x1 - x0, y1 - y0)
        for shade, width, line in (("black", 2.6, "-"), (colour, 1.4, style)):
            axis.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=shade, linestyle=line, linewidth=width))


__all__ = ["draw_localization"]
