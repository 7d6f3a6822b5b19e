"""An image with the boxes and the mask of its objects, and the part of it that a model sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = 255


class Picture(NamedTuple):
    """An image as it was read.

    Attributes:
        pixels: ``(height, width, 3)`` uint8.
        boxes: ``(n, 4)`` float64, x0, y0, x1, y1 with exclusive right and bottom edges, in pixels of ``size``.
        mask: ``(height, width)`` uint8, 0 for background, 255 for pixels that do not count; None where there is none.
        size: height and width that the boxes refer to; ``pixels`` may be a smaller copy.
    """

    pixels: np.ndarray
    boxes: Tensor
    mask: np.ndarray | None
    size: tuple[int, int]


@dataclass(frozen=True)
class LocalizationSource:
    """Labelled images with boxes or masks, in memory or on disk.

    Attributes:
        names: a name for each image, all different.
        labels: the classes of each image, indices.
        classes: names of the classes.
        splits: ``"train"``, ``"val"`` or ``"test"`` for each image.
        multilabel: whether an image may have several classes.
        has_masks: whether there are masks.
        mask_classes: whether masks hold 1 + index of the class, instead of 1 for the object.
        image_size: height and width that images are brought to when nothing else is asked for.
        mirrored: whether an image keeps its class when left and right change places.
        read: reads the image of a position.
    """

    names: Sequence[str]
    labels: Sequence[tuple[int, ...]]
    classes: Sequence[str]
    splits: Sequence[str]
    multilabel: bool
    has_masks: bool
    mask_classes: bool
    image_size: int
    mirrored: bool
    read: Callable[[int], Picture]


@dataclass(frozen=True)
class View:
    """A square that is cut out of an image after its sides were brought to one length.

    Attributes:
        resize: height and width that the whole image is brought to; its aspect is not kept.
        left: first column of the square.
        top: first row of the square.
        size: height and width of the square.
        flip: whether left and right change places.
    """

    resize: int
    left: int
    top: int
    size: int
    flip: bool = False

    def pixels(self, picture: Picture) -> Tensor:
        """The image, ``(3, size, size)`` float32 in [0, 1]."""
        from PIL import Image

        pixels = picture.pixels
        if pixels.shape[:2] != (self.resize, self.resize):
            image = Image.fromarray(pixels).resize((self.resize, self.resize), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
        return torch.from_numpy(np.ascontiguousarray(self._cut(pixels).transpose(2, 0, 1))).float().div(255)

    def boxes(self, picture: Picture) -> Tensor:
        """Boxes in pixels of the square, ``(n, 4)`` float32; those that lie outside of a cut are left out."""
        height, width = picture.size
        # Multiplied before it is divided: a box that falls on whole pixels stays on them.
        scaled = picture.boxes * self.resize / torch.tensor([width, height, width, height], dtype=torch.float64)
        if self.size != self.resize:
            scaled = scaled - torch.tensor([self.left, self.top, self.left, self.top], dtype=torch.float64)
            scaled = scaled.clamp(0, self.size)
            scaled = scaled[(scaled[:, :2] < scaled[:, 2:]).all(1)]
        if self.flip:
            scaled = torch.stack([self.size - scaled[:, 2], scaled[:, 1], self.size - scaled[:, 0], scaled[:, 3]], 1)
        return scaled.float()

    def mask(self, picture: Picture) -> Tensor:
        """The mask, ``(size, size)`` uint8; all ignored where the image has none."""
        if picture.mask is None:
            return torch.full((self.size, self.size), IGNORED, dtype=torch.uint8)
        return torch.from_numpy(np.array(self._cut(nearest(picture.mask, (self.resize, self.resize)))))

    def _cut(self, values: np.ndarray) -> np.ndarray:
        square = values[self.top : self.top + self.size, self.left : self.left + self.size]
        return square[:, ::-1] if self.flip else square


def nearest(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bring a mask to another size without mixing its values.

    Args:
        mask: ``(height, width)``.
        shape: the height and width that are wanted.
    """
    if mask.shape == shape:
        return mask
    rows = np.arange(shape[0]) * mask.shape[0] // shape[0]
    columns = np.arange(shape[1]) * mask.shape[1] // shape[1]
    return np.asarray(mask[rows[:, None], columns])


__all__ = ["IGNORED", "LocalizationSource", "Picture", "View", "nearest"]
