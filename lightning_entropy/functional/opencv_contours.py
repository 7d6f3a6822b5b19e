"""Boxes of the contours of nested level sets, level by level, by OpenCV."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_entropy.extras import require
from lightning_entropy.functional.level_boxes import Contours, FoundBoxes


def opencv_boxes(visible: NDArray[np.integer], *, steps: int, contours: Contours) -> FoundBoxes:
    """What `lightning_entropy.functional.level_boxes.swept_boxes` finds, with OpenCV.

    Each level that differs from the one before is searched once, and only within the extent of its foreground: what
    lies around that is background and connected with what lies outside the map.

    Args:
        visible: ``(images, height, width)``, 0 to ``steps``: at how many thresholds a pixel is foreground; at most
            256 different values a map.
        steps: number of thresholds.
        contours: see `lightning_entropy.functional.boxes_at_thresholds`.

    Raises:
        ImportError: if OpenCV is not installed.
    """
    cv2 = require("cv2", extra="localization")
    search = {"all": _all, "largest": _largest, "largest_component": _largest_component}[contours]
    boxes: list[tuple[int, int, int, int]] = []  # x, y, width, height in the searched part
    # Map, first threshold, threshold after the last one, left and top of the searched part, number of boxes.
    spans: list[tuple[int, int, int, int, int, int]] = []
    for index, one in enumerate(visible):
        present = np.flatnonzero(np.bincount(one.reshape(-1), minlength=steps + 1))
        ranks = np.searchsorted(present, np.arange(steps + 1)).astype(np.uint8)[one]
        ends = present.tolist()
        levels = np.arange(int(ends[0] == 0), len(ends))
        rows, columns = ranks.max(1) >= levels[:, None], ranks.max(0) >= levels[:, None]
        extents = (
            rows.argmax(1),
            len(one) - rows[:, ::-1].argmax(1),
            columns.argmax(1),
            one.shape[1] - columns[:, ::-1].argmax(1),
        )
        for level, top, bottom, left, right in zip(levels.tolist(), *(extent.tolist() for extent in extents)):
            _, mask = cv2.threshold(ranks[top:bottom, left:right], level - 1, 255, cv2.THRESH_BINARY)
            found = search(cv2, mask)
            boxes += found
            spans.append((index, ends[level - 1] if level else 0, ends[level], left, top, len(found)))
    image, begin, end, left_of, top_of, count = np.array(spans, dtype=np.int64).reshape(-1, 6).T
    x, y, wide, tall = np.array(boxes, dtype=np.int64).reshape(-1, 4).T
    x, y = x + left_of.repeat(count), y + top_of.repeat(count)
    corners = np.stack((x, y, x + wide - 1, y + tall - 1), axis=1)
    return FoundBoxes(image.repeat(count), corners, begin.repeat(count), end.repeat(count))


def _all(cv2: ModuleType, mask: Any) -> list[tuple[int, int, int, int]]:
    found, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    return [cv2.boundingRect(contour) for contour in found]


def _largest(cv2: ModuleType, mask: Any) -> list[tuple[int, int, int, int]]:
    # Neither a hole nor what lies inside it can be larger than what is around both.
    found, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if len(found) > 1:
        areas = [cv2.contourArea(contour) for contour in found]
        largest = max(areas)
        found = [contour for contour, area in zip(found, areas) if area == largest]
    if len(found) > 1:  # the order in which OpenCV lists contours is not part of its interface
        found = [max(found, key=lambda contour: min((y, x) for x, y in contour[:, 0].tolist()))]
    return [cv2.boundingRect(found[0])]


def _largest_component(cv2: ModuleType, mask: Any) -> list[tuple[int, int, int, int]]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    pixels = stats[1:, cv2.CC_STAT_AREA]  # 0 is the background
    largest = np.flatnonzero(pixels == pixels.max()) + 1
    if len(largest) > 1:
        largest = largest[[int(np.argmax([(labels == label).argmax() for label in largest]))]]
    x, y, w, h = stats[largest[0], :4].tolist()
    return [(x, y, w, h)]


__all__ = ["opencv_boxes"]
