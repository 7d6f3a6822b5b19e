"""The published evaluator of Choe et al. (CVPR 2020), written anew and slowly, from what is known of its behaviour.

Every threshold is treated by itself, with flood fills and a traced polygon in plain Python; nothing is shared with the
package. `opencv_boxes` and `OpenCVLoop` do the same with one ``cv2.findContours`` a threshold, as the published code
does, and is what the benchmark is timed against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Box = tuple[int, int, int, int]
EIGHT = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
FOUR = [(-1, 0), (0, -1), (0, 1), (1, 0)]
CLOCKWISE = [(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)]  # row, column; rows go down


def normalized(score_map: np.ndarray) -> np.ndarray:
    values = np.array(score_map, dtype=np.float64)
    if np.isnan(values).any() or values.min() == values.max():
        return np.zeros_like(values)
    values -= values.min()
    values /= values.max()
    return values


def foreground(score_map: np.ndarray, threshold: float) -> np.ndarray:
    """The map is in [0, 1]."""
    levels = (score_map * 255).astype(np.uint8)
    return levels > int(threshold * levels.max())


def components(mask: list[list[bool]], around: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Connected components in the raster order of their first pixels."""
    height, width = len(mask), len(mask[0])
    seen = [[False] * width for _ in range(height)]
    for row in range(height):
        for column in range(width):
            if not mask[row][column] or seen[row][column]:
                continue
            seen[row][column] = True
            pixels, waiting = [], [(row, column)]
            while waiting:
                r, c = waiting.pop()
                pixels.append((r, c))
                for dr, dc in around:
                    y, x = r + dr, c + dc
                    if 0 <= y < height and 0 <= x < width and mask[y][x] and not seen[y][x]:
                        seen[y][x] = True
                        waiting.append((y, x))
            yield pixels


def _traced_area(pixels: list[tuple[int, int]]) -> float:
    """Area of the polygon along the outer border, by walking around it and the shoelace formula."""
    inside = set(pixels)
    start = min(inside)  # the first in raster order: nothing of the component lies above it, or to its left
    path = [start]
    at, facing = start, 4  # as if it had been entered from the left
    first_move = None
    while True:
        for turn in range(1, 9):
            direction = (facing + turn) % 8
            candidate = (at[0] + CLOCKWISE[direction][0], at[1] + CLOCKWISE[direction][1])
            if candidate in inside:
                break
        else:
            return 0.0  # a single pixel
        if first_move is None:
            first_move = (at, direction)
        elif (at, direction) == first_move:
            break
        at = candidate
        path.append(at)
        facing = (direction + 4) % 8  # back to where it came from
    doubled = sum(a[1] * b[0] - b[1] * a[0] for a, b in zip(path, path[1:] + path[:1]))
    return abs(doubled) / 2


def _extent(pixels: list[tuple[int, int]]) -> Box:
    rows, columns = [r for r, _ in pixels], [c for _, c in pixels]
    return min(columns), min(rows), max(columns), max(rows)


def boxes_at(score_map: np.ndarray, threshold: float, *, contours: str) -> list[Box]:
    """Boxes of a map in [0, 1] at one threshold; ``contours`` as in the package."""
    mask = foreground(score_map, threshold).tolist()
    height, width = len(mask), len(mask[0])
    outer = list(components(mask, EIGHT))
    if not outer:
        return [(0, 0, 0, 0)]
    if contours == "all":
        extents = [_extent(pixels) for pixels in outer]
        framed = [[True] * (width + 2), *([True, *(not on for on in row), True] for row in mask), [True] * (width + 2)]
        for hole in list(components(framed, FOUR))[1:]:  # the first one is the frame
            x0, y0, x1, y1 = _extent(hole)
            extents.append((x0 - 2, y0 - 2, x1, y1))  # one pixel more on each side, without the frame
    else:
        sizes = [len(pixels) if contours == "largest_component" else _traced_area(pixels) for pixels in outer]
        last = max(range(len(outer)), key=lambda n: (sizes[n], n))
        extents = [_extent(outer[last])]
    return [(x0, y0, min(x1 + 1, width - 1), min(y1 + 1, height - 1)) for x0, y0, x1, y1 in extents]


def iou(a: Sequence[int], b: Sequence[int]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return both / (sum(areas) - both)


def average_precision(
    maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], interval: float = 0.001
) -> tuple[float, np.ndarray]:
    """PxAP in [0, 1] and the histograms of object and background pixels, pixel by pixel."""
    edges = [*np.arange(0, 1, interval).tolist(), 1.0, 2.0, 3.0]
    counts = np.zeros((2, len(edges) - 1), dtype=int)
    for score_map, mask in zip(maps, masks):
        for score, label in zip(score_map.ravel().tolist(), mask.ravel().tolist()):
            if label in (0, 1):
                counts[1 - label, max(n for n, edge in enumerate(edges) if edge <= score)] += 1
    total = int(counts[0].sum())
    if not total:
        raise RuntimeError("no positive pixel")
    area, true, false, before = 0.0, 0, 0, 0.0
    for n in reversed(range(len(edges) - 1)):
        true, false = true + int(counts[0, n]), false + int(counts[1, n])
        recall = true / total
        if true + false:
            area += true / (true + false) * (recall - before)
        before = recall
    return area, counts


class OpenCVLoop:
    """Box accuracy with one search for contours a threshold."""

    def __init__(self, thresholds: Sequence[float], ious: Sequence[float], *, multiple: bool) -> None:
        import cv2

        self.cv2: Any = cv2
        self.thresholds, self.ious, self.multiple = thresholds, ious, multiple
        self.correct = {value: np.zeros(len(thresholds)) for value in ious}
        self.count = 0

    def boxes(self, levels: np.ndarray, threshold: float) -> np.ndarray:
        height, width = levels.shape
        cv2 = self.cv2
        _, mask = cv2.threshold(levels, int(threshold * levels.max()), 255, cv2.THRESH_BINARY)
        contours, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        if not contours:
            return np.zeros((1, 4), dtype=int)
        if not self.multiple:
            contours = [max(contours, key=cv2.contourArea)]
        found = []
        for contour in contours:
            x, y, w, h = cv2.boundingRect(contour)
            found.append((x, y, min(x + w, width - 1), min(y + h, height - 1)))
        return np.array(found)

    def accumulate(self, score_map: np.ndarray, truth: np.ndarray) -> None:
        levels = (normalized(score_map) * 255).astype(np.uint8)
        found = [self.boxes(levels, threshold) for threshold in self.thresholds]
        a, b = np.concatenate(found)[:, None], truth[None]
        size = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1, 0)
        both = size.prod(-1)
        areas = [(box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (a, b)]
        overlap = (both / (areas[0] + areas[1] - both)).max(1)
        starts = np.cumsum([0, *(len(boxes) for boxes in found[:-1])])
        best = np.maximum.reduceat(overlap, starts)
        for value in self.ious:
            self.correct[value] += best >= value
        self.count += 1

    def compute(self) -> list[float]:
        return [float((self.correct[value] / self.count).max()) if self.count else math.nan for value in self.ious]
