"""Several kinds of score maps, evaluated at once by the same protocol."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_entropy.functional.localization_boxes import Contours
from lightning_entropy.localization import MaxBoxAccuracyV2, PixelAveragePrecision, TopKLocalization


class Thresholds(NamedTuple):
    """Thresholds of one kind of map.

    Attributes:
        gt_known: for GT-known and Top-1 localization alike: a prediction has one box.
        max_box_v2: one for each IoU.
    """

    gt_known: float
    max_box_v2: tuple[float, ...]


@contextmanager
def nothing_seen_yet() -> Iterator[None]:
    """Without torchmetrics' warning: a process, or a set without boxes, may have seen no image."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        yield


class MapScores:
    """GT-known, Top-1 localization, MaxBoxAccV2 and PxAP of several kinds of maps.

    Images without a true box are left out of the first three, images without an object pixel of PxAP.

    Args:
        names: of the maps.
        contours: which box of a map counts for GT-known and Top-1; MaxBoxAccV2 takes all.
        interval: distance of the thresholds.
        device: where counts are kept, so that processes can add them.

    Example:
        >>> scores = MapScores(["cam"], interval=0.1)
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 1:4] = 1
        >>> scores.update({"cam": maps}, [torch.tensor([[1, 2, 4, 5]])], torch.eye(2)[:1], torch.tensor([0]))
        >>> scores.compute()["cam/gt_known"]
        1.0
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        contours: Contours = "largest_component",
        interval: float = 0.001,
        device: torch.device | str = "cpu",
    ) -> None:
        self.names = list(names)
        options: dict[str, object] = {"interval": interval, "without_box": "skip"}
        self._top = {n: TopKLocalization(k=1, contours=contours, **options).to(device) for n in names}  # type: ignore[arg-type]
        self._v2 = {n: MaxBoxAccuracyV2(**options).to(device) for n in names}  # type: ignore[arg-type]
        self._pixels = {n: PixelAveragePrecision().to(device) for n in names}

    def update(
        self,
        maps: Mapping[str, Tensor],
        boxes: Sequence[Tensor],
        logits: Tensor,
        labels: Tensor,
        masks: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            maps: ``(B, H, W)`` or ``(B, 1, H, W)`` each, at the images' size: of the label's class, or averaged.
            boxes: the true ones of each image, ``(n, 4)`` in pixels of the map.
            logits: ``(B, classes)``.
            labels: ``(B,)``.
            masks: ``(B, H, W)``, 1 for object, 255 for pixels that are not judged; None where there are none.
        """
        kept = None if masks is None else (masks == 1).flatten(1).any(1)
        for name in self.names:
            self._top[name].update(maps[name], boxes, logits, labels)
            self._v2[name].update(maps[name], boxes)
            if masks is not None and kept is not None and bool(kept.any()):
                self._pixels[name].update(maps[name][kept], masks[kept])

    def _seen(self, name: str) -> bool:
        return math.isfinite(self._max_box_v2(name))  # added over the processes

    def _max_box_v2(self, name: str) -> float:
        with nothing_seen_yet():
            values = self._v2[name].compute()
        return float(next(value for key, value in values.items() if key.endswith("box_accuracy_v2")))

    def fit(self) -> dict[str, Thresholds]:
        """The best thresholds of what was seen; empty where no image had a box."""
        found = {}
        for name in self.names:
            if self._seen(name):
                first = self._top[name].fit_threshold()[0]  # that of GT-known
                self._top[name].threshold = (first, first)
                found[name] = Thresholds(first, self._v2[name].fit_threshold())
        return found

    def use(self, thresholds: Mapping[str, Thresholds | float]) -> list[str]:
        """Evaluate at these; returns the names of the maps that have none, which are judged at their own best."""
        own = []
        for name in self.names:
            kept = thresholds.get(name)
            if isinstance(kept, Thresholds):
                self._top[name].threshold = (kept.gt_known, kept.gt_known)
                self._v2[name].threshold = kept.max_box_v2
            else:
                own.append(name)
        return own

    def _pxap(self, name: str) -> float | None:
        try:
            with nothing_seen_yet():
                return float(self._pixels[name].compute()["pixel_average_precision"])
        except ValueError:  # no object pixel in any process
            return None

    def compute(self) -> dict[str, float]:
        """``NAME/gt_known``, ``NAME/top1_loc``, ``NAME/max_box_v2``, and ``NAME/pxap`` where there are masks."""
        values: dict[str, float] = {}
        for name in self.names:
            if self._seen(name):
                top = self._top[name].compute()
                values[f"{name}/gt_known"] = float(top["gt_known"])
                values[f"{name}/top1_loc"] = float(top["top1"])
                values[f"{name}/max_box_v2"] = self._max_box_v2(name)
            pixels = self._pxap(name)
            if pixels is not None:
                values[f"{name}/pxap"] = pixels
        return values


__all__ = ["MapScores", "Thresholds", "nothing_seen_yet"]
