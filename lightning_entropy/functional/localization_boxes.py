"""Boxes of score maps at every threshold, as the evaluator of Choe et al. (CVPR 2020) finds them.

A map is scaled to [0, 1] and rounded down to 256 levels; at threshold t the foreground is what lies strictly above
``int(t * largest level)``. Boxes are those of the contours of the foreground: the outer contours of its
8-connected components, and the contours of their holes, which run on the pixels around a hole. The right and lower
edges are exclusive and clipped to the last pixel, so that a box is one pixel too large except at the border; this is
the published protocol.

Only a few of the 1,000 thresholds differ. With OpenCV each differing level is searched once, within the extent of its
foreground; without it, and where the contours are long, all levels are found in one sweep (`level_components`). The
numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_entropy.functional.level_boxes import CHUNK_PIXELS, Contours, FoundBoxes, swept_boxes
from lightning_entropy.functional.opencv_contours import opencv_boxes

Backend = Literal["auto", "opencv", "numpy"]
CONTOURS = get_args(Contours)
BACKENDS = get_args(Backend)

# Pixels of contours of all levels, for each pixel of a map, up to which OpenCV is the faster way (see the benchmark).
SHORT_CONTOURS = 4


class ThresholdBoxes(NamedTuple):
    """Boxes and the thresholds at which they are found.

    Attributes:
        boxes: ``(N, 4)`` int64, ``x0, y0, x1, y1`` in pixels of the map, right and lower edge exclusive and clipped.
        image: ``(N,)``, the map of each box.
        first: ``(N,)``, the index of the first threshold at which the box is found.
        last: ``(N,)``, the index of the last one, included.
    """

    boxes: Tensor
    image: Tensor
    first: Tensor
    last: Tensor

    def at(self, image: int, threshold: int) -> Tensor:
        """Boxes ``(n, 4)`` of one map at the threshold of this index, without repetitions, sorted."""
        chosen = (self.image == image) & (self.first <= threshold) & (self.last >= threshold)
        return torch.unique(self.boxes[chosen], dim=0)


def normalize_score_maps(maps: Tensor) -> Tensor:
    r"""Scale each map to [0, 1].

    .. math:: m' = \frac{m - \min m}{\max (m - \min m)}

    in float64. A constant map and a map with a NaN become zero, as in the official evaluator.

    Args:
        maps: ``(B, H, W)`` or ``(B, 1, H, W)``.

    Returns:
        ``(B, H, W)``, float64, on the device of ``maps`` where it has float64, else on the CPU.

    Raises:
        ValueError: if the shape is another one or a value is infinite.

    Example:
        >>> normalize_score_maps(torch.tensor([[[1.0, 3.0], [2.0, 5.0]]]))
        tensor([[[0.0000, 0.5000],
                 [0.2500, 1.0000]]], dtype=torch.float64)
    """
    maps = _three_dimensional(maps)
    if not len(maps):
        return maps
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = high - low
    if bool((low.isinf() | high.isinf()).any()):
        raise ValueError("score maps must not hold infinite values")
    usable = span > 0  # false for NaN
    scaled = (maps - low) / torch.where(usable, span, 1.0)
    return scaled if bool(usable.all()) else torch.where(usable, scaled, 0.0)


def _three_dimensional(maps: Tensor) -> Tensor:
    if maps.ndim == 4 and maps.shape[1] == 1:
        maps = maps[:, 0]
    if maps.ndim != 3 or (maps.shape[0] and not maps[0].numel()):
        raise ValueError(f"score maps must have the shape (B, H, W) or (B, 1, H, W), got {tuple(maps.shape)}")
    if maps.device.type == "mps":  # has no float64
        maps = maps.cpu()
    return maps.detach().double()


def checked_score_maps(maps: Tensor, *, normalize: bool) -> Tensor:
    """Score maps in [0, 1], ``(B, H, W)`` float64.

    Args:
        maps: ``(B, H, W)`` or ``(B, 1, H, W)``.
        normalize: scale each map to [0, 1] by itself; otherwise they must be in [0, 1] as they are.

    Raises:
        ValueError: if the shape is another one, or values are outside [0, 1] where they are not scaled.
    """
    if normalize:
        return normalize_score_maps(maps)
    maps = _three_dimensional(maps)
    if not bool(((maps >= 0) & (maps <= 1)).all()):
        raise ValueError(
            f"score maps must be in [0, 1] with normalize=False, got {maps.min().item()} to {maps.max().item()} "
            f"({int(maps.isnan().sum())} NaN); pass normalize=True to scale each map"
        )
    return maps


def protocol_thresholds(interval: float = 0.001) -> NDArray[np.float64]:
    """The thresholds ``0, interval, 2 * interval, ...`` below 1.

    Args:
        interval: 0.001 in the official evaluation, 0.01 in the default of its command line.

    Returns:
        ``np.arange(0, 1, interval)``.

    Raises:
        ValueError: if the interval is not in [1e-6, 1].
    """
    if not 1e-6 <= interval <= 1:  # finer is a million thresholds, of which each map is searched at all
        raise ValueError(f"interval must be at least 1e-6 and at most 1, got {interval}")
    return np.arange(0, 1, interval)


def scale_boxes(boxes: Tensor, *, image_size: tuple[int, int], map_size: tuple[int, int] = (224, 224)) -> Tensor:
    """Boxes of an image in the pixels of its map, rounded towards zero as in the official evaluator.

    Args:
        boxes: ``(..., 4)``, ``x0, y0, x1, y1``.
        image_size: width and height of the image.
        map_size: width and height of the map.

    Returns:
        ``(..., 4)`` int64.

    Example:
        >>> scale_boxes(torch.tensor([[10, 20, 100, 90]]), image_size=(160, 100))
        tensor([[ 14,  44, 140, 201]])
    """
    into = torch.tensor([*map_size, *map_size], dtype=torch.float64)
    of = torch.tensor([*image_size, *image_size], dtype=torch.float64)
    return (boxes.detach().cpu().double() * into / of).trunc().long()


def boxes_at_thresholds(
    maps: Tensor,
    thresholds: Sequence[float] | NDArray[np.float64] | None = None,
    *,
    contours: Contours = "all",
    normalize: bool = True,
    backend: Backend = "auto",
) -> ThresholdBoxes:
    """Boxes of score maps at every threshold.

    Args:
        maps: ``(B, H, W)`` or ``(B, 1, H, W)``.
        thresholds: ascending, in [0, 1]; ``None`` for `protocol_thresholds`.
        contours: ``"all"``: every outer contour and every hole (MaxBoxAccV2); ``"largest"``: the contour around the
            largest area, measured through the centres of its pixels with holes filled (MaxBoxAcc);
            ``"largest_component"``: the component of the most pixels, holes not counted. Of several that are equally
            large, the one whose first pixel comes last in raster order, which is the one that OpenCV lists first.
        normalize: scale each map to [0, 1]; otherwise it must be in [0, 1], and thresholds are relative to its maximum.
        backend: ``"numpy"`` finds all levels in one sweep, ``"opencv"`` goes through the levels. ``"auto"`` takes
            OpenCV where it is installed for maps with short contours, and for few thresholds. The boxes are the same.

    Returns:
        The boxes with their map and thresholds, on the CPU. Where nothing lies above a threshold there is the box
        ``(0, 0, 0, 0)``, as in the official evaluator.

    Raises:
        ValueError: if maps or thresholds are not as above.
        ImportError: if ``backend="opencv"`` and OpenCV is not installed.

    Reference:
        Choe et al., Evaluating Weakly Supervised Object Localization Methods Right, CVPR 2020, arXiv 2001.07437.

    Example:
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 1:4] = 1
        >>> boxes_at_thresholds(maps, [0.5]).boxes
        tensor([[1, 2, 4, 5]])
    """
    if contours not in CONTOURS:
        raise ValueError(f"contours must be one of {', '.join(CONTOURS)}, got {contours!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    grid = protocol_thresholds() if thresholds is None else np.asarray(thresholds, dtype=np.float64).reshape(-1)
    if not len(grid) or not (np.diff(grid) >= 0).all() or not (grid[0] >= 0 and grid[-1] <= 1):
        raise ValueError(f"thresholds must be ascending and in [0, 1], got {grid.tolist()[:10]}")
    scaled = checked_score_maps(maps, normalize=normalize)
    levels = (scaled * 255).to(torch.uint8).cpu().numpy()  # truncates
    visible = _visible_thresholds(levels, grid)
    height, width = levels.shape[1:]
    if backend == "auto":
        installed = find_spec("cv2") is not None
        opencv = _short_contours(visible, steps=len(grid)) if installed else np.zeros(len(visible), dtype=bool)
    else:
        opencv = np.full(len(visible), backend == "opencv")
    size = max(1, CHUNK_PIXELS // max(1, height * width))
    found = [_nothing(visible, steps=len(grid))]
    for search, chosen in ((opencv_boxes, np.flatnonzero(opencv)), (swept_boxes, np.flatnonzero(~opencv))):
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            boxes = search(visible[part], steps=len(grid), contours=contours)
            extent = np.minimum(boxes.boxes + np.array([0, 0, 1, 1]), (width, height, width - 1, height - 1))
            found.append(boxes._replace(image=part[boxes.image], boxes=extent))
    image, corners, begin, end = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*found))
    return ThresholdBoxes(corners, image, begin, end - 1)


def _short_contours(visible: NDArray[np.integer], *, steps: int) -> NDArray[np.bool_]:
    """Which maps OpenCV, whose time grows with the length of contours, goes through faster than a sweep.

    Neighbouring pixels are apart at as many of the differing levels as their ranks differ by, so the total variation
    of the ranks is the length of the contours of all levels (coarea formula). Every fourth line is enough to tell.
    """
    short = np.zeros(len(visible), dtype=bool)
    for index, one in enumerate(visible):
        present = np.flatnonzero(np.bincount(one.reshape(-1), minlength=steps + 1))
        rank = np.searchsorted(present, np.arange(steps + 1)).astype(np.int16)
        lines = (rank[one[::4]], rank[one.T[::4]])
        length = sum(np.abs(np.diff(part)).mean() for part in lines if part.shape[1] > 1)
        short[index] = length <= SHORT_CONTOURS
    return short


def _visible_thresholds(levels: NDArray[np.uint8], grid: NDArray[np.float64]) -> NDArray[np.int16]:
    """How many of the thresholds each pixel lies above; these are always the first ones, ``(B, H, W)``."""
    visible = np.zeros(levels.shape, dtype=np.int16 if len(grid) < 2**15 else np.int32)
    for one, of in zip(levels, visible):
        cuts = (grid * int(one.max())).astype(np.int64)  # truncates
        of[:] = np.searchsorted(cuts, np.arange(256), side="left")[one]
    return visible


def _nothing(visible: NDArray[np.integer], *, steps: int) -> FoundBoxes:
    """The box that stands for "no contour", at the thresholds where a map has no foreground."""
    first = visible.max((1, 2), initial=0).astype(np.int64)
    image = np.flatnonzero(first < steps)
    return FoundBoxes(image, np.zeros((len(image), 4), dtype=np.int64), first[image], np.full(len(image), steps))


__all__ = [
    "BACKENDS",
    "CONTOURS",
    "Backend",
    "Contours",
    "ThresholdBoxes",
    "boxes_at_thresholds",
    "checked_score_maps",
    "normalize_score_maps",
    "protocol_thresholds",
    "scale_boxes",
]
