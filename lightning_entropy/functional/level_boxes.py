"""Boxes of the contours of nested level sets, by sweeps over all levels."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_entropy.functional.level_components import Components, Ints, Sweep, fill_holes

Contours = Literal["all", "largest", "largest_component"]

Number = TypeVar("Number", np.int64, np.float64)

# Pixels of maps that are swept together: the fixed cost of a level is shared, and the arrays stay in the cache.
CHUNK_PIXELS = 1_000_000


class FoundBoxes(NamedTuple):
    """Inclusive boxes ``(N, 4)``, their map, and the thresholds ``begin`` to ``end`` (excluded) of each."""

    image: Ints
    boxes: Ints
    begin: Ints
    end: Ints


def swept_boxes(visible: NDArray[np.integer], *, steps: int, contours: Contours) -> FoundBoxes:
    """Boxes of the foreground ``{visible > j}`` at every threshold ``j`` of ``steps``.

    Args:
        visible: ``(images, height, width)``, 0 to ``steps``: at how many thresholds a pixel is foreground.
        steps: number of thresholds.
        contours: see `lightning_entropy.functional.boxes_at_thresholds`.
    """
    if contours == "all":
        outer = Sweep(steps - visible, steps=steps, diagonal=True).components()
        # A hole is a component of the background that is not connected with what lies outside the map.
        holes = Sweep(visible, steps=steps, diagonal=False, frame=True).components()
        outer_boxes = _falling(outer, steps=steps)
        return FoundBoxes(
            np.concatenate((outer_boxes.image, holes.image)),
            np.concatenate((outer_boxes.boxes, holes.boxes + np.array([-1, -1, 1, 1]))),
            np.concatenate((outer_boxes.begin, holes.begin)),
            np.concatenate((outer_boxes.end, holes.end)),
        )
    if contours == "largest":
        # With its holes filled at every level, a component's contour area is a sum over 2 x 2 windows, and a
        # component inside a hole of another one is gone, which could not be the largest.
        visible = fill_holes(visible)
    components = Sweep(
        steps - visible, steps=steps, diagonal=True, weight="area" if contours == "largest" else "pixels"
    ).components()
    boxes = _falling(components, steps=steps)
    best = _best_at_each(boxes, np.lexsort((components.start, components.weight)), images=len(visible), steps=steps)
    return _runs(boxes, best)


def _falling(components: Components, *, steps: int) -> FoundBoxes:
    """From steps of a falling level to thresholds: step ``s`` is threshold ``steps - 1 - s``."""
    return FoundBoxes(components.image, components.boxes, steps - components.end, steps - components.begin)


def largest_at_each(
    values: NDArray[Number], image: Ints, begin: Ints, end: Ints, *, images: int, steps: int, floor: int
) -> NDArray[Number]:
    """Largest value among the intervals that cover each step.

    Every interval is covered by two that may overlap, of a power of two long; each power is a row, and the rows are
    handed down from the longest to single steps.

    Args:
        values: ``(N,)``.
        image: ``(N,)``.
        begin: ``(N,)``, first step.
        end: ``(N,)``, step after the last one, greater than ``begin``.
        images: number of images.
        steps: number of steps.
        floor: the value where no interval covers a step.

    Returns:
        ``(images, steps)``, the dtype of ``values``.
    """
    powers = max(1, int(steps).bit_length())
    rows = np.full((powers, images, steps), floor, dtype=values.dtype)
    power = np.frexp(end - begin)[1] - 1  # floor(log2(length)), exact
    np.maximum.at(rows, (power, image, begin), values)
    np.maximum.at(rows, (power, image, end - (1 << power)), values)
    for row in range(powers - 1, 0, -1):
        half = 1 << (row - 1)
        np.maximum(rows[row - 1], rows[row], out=rows[row - 1])
        np.maximum(rows[row - 1][:, half:], rows[row][:, : steps - half], out=rows[row - 1][:, half:])
    return rows[0]


def _best_at_each(boxes: FoundBoxes, ascending: Ints, *, images: int, steps: int) -> Ints:
    """Index of the highest ranking box of each image and threshold, ``(images, steps)``; -1 where there is none."""
    rank = np.empty(len(ascending), dtype=np.int64)
    rank[ascending] = np.arange(len(ascending))
    best = largest_at_each(rank, boxes.image, boxes.begin, boxes.end, images=images, steps=steps, floor=-1)
    return np.where(best >= 0, np.append(ascending, -1)[best], -1)


def _runs(boxes: FoundBoxes, best: Ints) -> FoundBoxes:
    """One box an image and threshold, runs of the same box as one interval."""
    images, steps = best.shape
    bounded = np.concatenate((best, np.full((images, 1), -2)), axis=1).reshape(-1)
    starts = np.flatnonzero(np.append(True, bounded[1:] != bounded[:-1]))
    starts, stops = starts[:-1], starts[1:]
    chosen = bounded[starts]
    image, begin = np.divmod(starts, steps + 1)
    kept = chosen >= 0
    return FoundBoxes(image[kept], boxes.boxes[chosen[kept]], begin[kept], (begin + stops - starts)[kept])


__all__ = ["CHUNK_PIXELS", "Contours", "FoundBoxes", "largest_at_each", "swept_boxes"]
