"""mIoU of maps as segmentations, where images have several labels and masks of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_entropy.localization import SegmentationIoU
from lightning_entropy.recipes.localization_scores import nothing_seen_yet

# Shares of a map's maximum below which a pixel is background; the best one of the validation images is taken.
BACKGROUND_THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


def present_maps(maps: Tensor, present: Tensor) -> Tensor:
    """Maps of the classes that an image has, each divided by its maximum; 0 for those that it has not.

    Args:
        maps: ``(B, classes, H, W)``; negative values count as 0.
        present: ``(B, classes)``, zeros and ones.

    Returns:
        ``(B, classes, H, W)`` in [0, 1].
    """
    positive = maps.relu()
    largest = positive.amax((2, 3), keepdim=True).clamp(min=1e-8)
    return positive / largest * present[:, :, None, None]


class SegmentationScores:
    """mIoU of several kinds of maps; image labels are known, as for pseudo-masks of training images.

    A pixel has the class of its highest map, or is background below a threshold. Class 0 of a mask is background,
    class c the label c - 1.

    Args:
        names: of the maps.
        classes: number of classes without the background.
        device: where counts are kept.

    Example:
        >>> scores = SegmentationScores(["cam"], classes=2)
        >>> maps = torch.tensor([[[[1.0, 0.1]], [[0.5, 0.1]]]])
        >>> scores.update({"cam": maps}, torch.tensor([[1.0, 0.0]]), torch.tensor([[[1, 0]]]))
        >>> scores.compute()["cam/miou"]
        1.0
    """

    def __init__(self, names: Sequence[str], *, classes: int, device: torch.device | str = "cpu") -> None:
        self.names, self.classes, self.device = list(names), classes, device
        self._iou = {name: self._metric(BACKGROUND_THRESHOLDS) for name in names}

    def _metric(self, thresholds: Sequence[float]) -> SegmentationIoU:
        return SegmentationIoU(self.classes + 1, background_thresholds=list(thresholds)).to(self.device)

    def update(self, maps: Mapping[str, Tensor], present: Tensor, masks: Tensor) -> None:
        """Add a batch.

        Args:
            maps: ``(B, classes, H, W)`` each.
            present: ``(B, classes)``, zeros and ones.
            masks: ``(B, H, W)``, 255 for pixels that are not judged.
        """
        for name in self.names:
            self._iou[name].update(present_maps(maps[name], present), masks.long())

    def fit(self) -> dict[str, float]:
        """The best background threshold of each map; empty where there was no mask."""
        found = self._computed()
        return {name: float(one["threshold"]) for name, one in found.items() if bool(one["miou"].isfinite())}

    def _computed(self) -> dict[str, dict[str, Tensor]]:
        with nothing_seen_yet():
            return {name: metric.compute() for name, metric in self._iou.items()}

    def use(self, thresholds: Mapping[str, object]) -> list[str]:
        """Evaluate at these; returns the names of the maps that have none."""
        for name in self.names:
            kept = thresholds.get(name)
            if isinstance(kept, float):
                self._iou[name] = self._at(self._iou[name], kept)
        return [name for name in self.names if not isinstance(thresholds.get(name), float)]

    def _at(self, metric: SegmentationIoU, threshold: float) -> SegmentationIoU:
        """The same counts, at one threshold."""
        place = min(range(len(BACKGROUND_THRESHOLDS)), key=lambda i: abs(BACKGROUND_THRESHOLDS[i] - threshold))
        fixed = self._metric([BACKGROUND_THRESHOLDS[place]])
        counts = metric.counts  # rows: how many thresholds lie below a pixel's score
        fixed.counts = torch.stack([counts[: place + 1].sum(0), counts[place + 1 :].sum(0)])
        return fixed

    def compute(self) -> dict[str, float]:
        """``NAME/miou``."""
        found = {f"{name}/miou": float(one["miou"]) for name, one in self._computed().items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}


__all__ = ["BACKGROUND_THRESHOLDS", "SegmentationScores", "present_maps"]
