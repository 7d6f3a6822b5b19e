"""Where a tile falls on a canvas, and the attention of the tiles as an image.

A canvas is a rectangle of the slide in level-0 pixels, drawn with fewer pixels. Tiles are painted into an
array, not drawn one by one, so that a slide of 100,000 tiles takes well under a second; where tiles overlap,
their attention is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOG_FLOOR = float(np.finfo(np.float32).tiny)
"""Attention below this (1.2e-38, the smallest normal float32) is taken as this before its logarithm."""


@dataclass(frozen=True)
class Canvas:
    """A rectangle of a slide, and the number of pixels it is drawn with.

    Args:
        left: level-0 x of the left edge.
        top: level-0 y of the upper edge.
        width: level-0 width.
        height: level-0 height.
        columns: pixels across.
        rows: pixels down.
    """

    left: int
    top: int
    width: int
    height: int
    columns: int
    rows: int

    @classmethod
    def fitting(cls, rectangle: tuple[int, int, int, int], *, max_side: int = 1600) -> Canvas:
        """Draw a rectangle with at most ``max_side`` pixels a side, keeping its aspect; never enlarge it.

        Args:
            rectangle: left, top, width and height in level-0 pixels.
            max_side: the longer side of the canvas in pixels.

        Raises:
            ValueError: if the rectangle is empty or ``max_side`` is not positive.
        """
        left, top, width, height = rectangle
        if width < 1 or height < 1:
            raise ValueError(f"a canvas needs a rectangle of at least one pixel, got {width} x {height}")
        if max_side < 1:
            raise ValueError(f"max_side must be at least 1, got {max_side}")
        scale = min(1.0, max_side / max(width, height))
        return cls(left, top, width, height, max(1, round(width * scale)), max(1, round(height * scale)))

    @property
    def downsample(self) -> tuple[float, float]:
        """Level-0 pixels in a canvas pixel, along x and along y."""
        return self.width / self.columns, self.height / self.rows


def bounding_rectangle(coords: NDArray[np.int64], patch_size: int, *, margin: int = 0) -> tuple[int, int, int, int]:
    """The level-0 rectangle (left, top, width, height) that holds all tiles, with a margin on each side."""
    left, top = (int(value) - margin for value in coords.min(axis=0))
    right, bottom = (int(value) + patch_size + margin for value in coords.max(axis=0))
    return left, top, right - left, bottom - top


def _edges(start: NDArray[np.int64], patch_size: int, origin: int, step: float, limit: int) -> NDArray[np.int64]:
    """First and last-plus-one canvas pixel of each tile along an axis, ``(2, N)``; at least one a tile."""
    first = np.floor((start - origin) / step + 0.5).astype(np.int64)
    last = np.floor((start + patch_size - origin) / step + 0.5).astype(np.int64)
    thin = last <= first  # less than a pixel: the one that holds its centre
    first = np.where(thin, np.floor((start + patch_size / 2 - origin) / step).astype(np.int64), first)
    last = np.where(thin, first + 1, last)
    return np.stack([np.clip(first, 0, limit), np.clip(last, 0, limit)])


def rasterize(
    values: NDArray[np.floating], coords: NDArray[np.int64], patch_size: int, canvas: Canvas
) -> NDArray[np.float64]:
    """Paint one value a tile on a canvas.

    Args:
        values: ``(N,)``, one value a tile.
        coords: ``(N, 2)`` level-0 x and y of each tile's upper left corner.
        patch_size: side of a tile in level-0 pixels.
        canvas: where to paint; tiles outside it are cut.

    Returns:
        ``(rows, columns)`` float64: the mean over the tiles that cover a pixel, NaN where there is none. A
        tile covers the pixels from its left edge, rounded, up to its right edge, rounded, and at least one,
        so that neighbours neither overlap nor leave a gap.
    """
    step_x, step_y = canvas.downsample
    x0, x1 = _edges(coords[:, 0], patch_size, canvas.left, step_x, canvas.columns)
    y0, y1 = _edges(coords[:, 1], patch_size, canvas.top, step_y, canvas.rows)
    weights = np.asarray(values, dtype=np.float64)
    total = np.zeros((canvas.rows, canvas.columns))
    count = np.zeros((canvas.rows, canvas.columns))
    for value, left, right, top, bottom in zip(weights.tolist(), x0.tolist(), x1.tolist(), y0.tolist(), y1.tolist()):
        total[top:bottom, left:right] += value
        count[top:bottom, left:right] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def log_ratio(attention: NDArray[np.floating], instances: int) -> NDArray[np.float64]:
    """``log(a N)``: 0 for uniform attention, at most ``log N``; NaN stays NaN."""
    return np.log(np.maximum(np.asarray(attention, dtype=np.float64), LOG_FLOOR)) + np.log(instances)
