"""What accuracies of localization by boxes share: counts at every threshold, the choice of a threshold, the curve."""

from __future__ import annotations

import warnings
from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_entropy.functional import best_iou_at_thresholds, boxes_at_thresholds, protocol_thresholds
from lightning_entropy.functional.localization_boxes import BACKENDS, CONTOURS, Backend, Contours
from lightning_entropy.training.figures import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Missing = Literal["error", "skip"]


class BoxMetric(Metric, ABC):
    """Counts, at every threshold, the images whose box overlaps a true box by each IoU.

    Args:
        iou: overlaps from which on an image counts as located.
        contours: see `lightning_entropy.functional.boxes_at_thresholds`.
        interval: distance of the thresholds where none is given.
        threshold: fixed thresholds, or ``None`` for the best ones of the data.
        normalize: scale each map to [0, 1]; otherwise it must be in [0, 1] already.
        without_box: ``"error"`` or ``"skip"`` for images without a true box.
        backend: see `lightning_entropy.functional.boxes_at_thresholds`.
        rows: number of accuracies; ``None`` for one an IoU.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: if an argument is outside its range.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor
    protocol: Tensor

    def __init__(
        self,
        *,
        iou: Sequence[float],
        contours: Contours,
        interval: float,
        threshold: float | Sequence[float] | None,
        normalize: bool,
        without_box: Missing,
        backend: Backend,
        rows: int | None = None,
        **kwargs: Any,
    ) -> None:
        # Setting the threshold changes what is computed from the same counts.
        super().__init__(compute_with_cache=False, **kwargs)
        self.iou = tuple(float(value) for value in iou)
        if not self.iou or not all(0 < value <= 1 for value in self.iou):
            raise ValueError(f"iou must be > 0 and <= 1, got {iou}")
        for name, value, known in (
            ("contours", contours, CONTOURS),
            ("without_box", without_box, ("error", "skip")),
            ("backend", backend, BACKENDS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.contours, self.normalize, self.without_box, self.backend = contours, normalize, without_box, backend
        if threshold is None:
            self.thresholds = protocol_thresholds(interval)
        else:
            fixed = [float(threshold)] if isinstance(threshold, (int, float)) else [float(t) for t in threshold]
            if not fixed or not all(0 <= value <= 1 for value in fixed):
                raise ValueError(f"threshold must be in [0, 1], got {threshold}")
            self.thresholds = np.unique(fixed)
        self._rows = len(self.iou) if rows is None else rows
        self._fixed: tuple[int, ...] | None = None
        self.threshold = threshold
        size = (self._rows, len(self.thresholds))
        self.add_state("correct", torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # MetricCollection takes metrics with equal states after the first batch for the same metric, and then updates
        # one of them only. The largest contour and the largest component seldom differ in one batch.
        protocol = (self.iou, contours, normalize, without_box, self.thresholds.tolist())
        self.add_state("protocol", torch.tensor(crc32(repr(protocol).encode())), dist_reduce_fx="max")

    @property
    def threshold(self) -> tuple[float, ...] | None:
        """The thresholds at which accuracies are reported, one for each, or ``None`` for the best ones of the data."""
        return None if self._fixed is None else tuple(float(self.thresholds[place]) for place in self._fixed)

    @threshold.setter
    def threshold(self, value: float | Sequence[float] | None) -> None:
        if value is None:
            self._fixed = None
            return
        values = [float(value)] * self._rows if isinstance(value, (int, float)) else [float(one) for one in value]
        if len(values) == 1:
            values *= self._rows
        if len(values) != self._rows:
            raise ValueError(f"{type(self).__name__} has {self._rows} accuracies, got {len(values)} thresholds")
        places = [int(np.abs(self.thresholds - one).argmin()) for one in values]
        for place, one in zip(places, values):
            if not abs(self.thresholds[place] - one) < 1e-9:
                raise ValueError(
                    f"threshold {one} is not among the {len(self.thresholds)} thresholds that "
                    f"{type(self).__name__} counts at; pass threshold={one} to its constructor"
                )
        self._fixed = tuple(places)

    def fit_threshold(self) -> tuple[float, ...]:
        """The best threshold of the images seen so far, for each accuracy, and keep it for later ones.

        Of several equally good thresholds the middle one is taken. `reset` does not forget it; in several processes
        every one must call this.

        Returns:
            One threshold an accuracy; assign it to ``threshold`` of the metric of another set.

        Raises:
            ValueError: if no image has been seen.
        """
        curves = self._synced_curves()
        if not bool(curves.isfinite().all()):
            raise ValueError(f"{type(self).__name__}.fit_threshold: no image has been seen yet")
        self._fixed = tuple(middle_of_best(curve) for curve in curves)
        assert self.threshold is not None
        return self.threshold

    def plot(self, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw accuracy against threshold.

        In several processes every one must call this.

        Args:
            ax: axes to draw on; ``None`` for a new figure.

        Returns:
            Figure and axes; hand the figure to `lightning_entropy.training.log_figure`.
        """
        curves = self._synced_curves().cpu().numpy()
        figure, axes = axes_or_new(ax)
        for row, (curve, label) in enumerate(zip(curves, self.labels())):
            lines = axes.plot(self.thresholds, curve, label=label, marker="." if len(curve) < 20 else None)
            if not np.isfinite(curve).all():
                continue
            place = middle_of_best(torch.from_numpy(curve)) if self._fixed is None else self._fixed[row]
            axes.plot(self.thresholds[place], curve[place], "o", color=lines[0].get_color())
        axes.set(xlabel="threshold of the score map", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(frameon=False)
        return figure, axes

    def labels(self) -> list[str]:
        """Names of the accuracies, for the legend."""
        return [f"IoU >= {value:g}" for value in self.iou]

    def _synced_curves(self) -> Tensor:
        # compute() is what torchmetrics wraps with the sum over processes; this process may have seen no image.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            self.compute()
        return self.curves

    def accuracies(self) -> tuple[Tensor, Tensor]:
        """Accuracy and threshold of each row, at the fixed thresholds or the best ones."""
        self.curves = self.correct / self.total  # NaN where nothing has been seen
        places = self._fixed or tuple(middle_of_best(curve) for curve in self.curves)
        at = torch.tensor(places, device=self.curves.device)
        thresholds = torch.from_numpy(self.thresholds).float().to(at.device)[at]
        return self.curves.gather(1, at[:, None])[:, 0], thresholds

    def best_prefix(self) -> str:
        """``"max_"`` where the best threshold of the data is taken."""
        return "max_" if self._fixed is None else ""

    def count(self, located: Tensor) -> None:
        """Add ``(images, rows, thresholds)``."""
        self.correct += located.sum(0).to(self.correct.device)
        self.total += len(located)

    def located(self, maps: Tensor, boxes: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
        """Which images are located, ``(images, iou, thresholds)`` bool, and the indices of these images."""
        truth = [_whole_boxes(one, index) for index, one in enumerate(boxes)]
        if len(truth) != len(maps):
            raise ValueError(f"{len(maps)} maps need as many entries of boxes, got {len(truth)}")
        kept = [index for index, one in enumerate(truth) if len(one)]
        if len(kept) < len(truth):
            if self.without_box == "error":
                absent = sorted(set(range(len(truth))) - set(kept))
                raise ValueError(
                    f"images {absent[:5]} of the batch have no true box, so they cannot be located; leave them out or "
                    f'pass without_box="skip" to {type(self).__name__}'
                )
            maps, truth = maps[kept], [truth[index] for index in kept]
        found = boxes_at_thresholds(
            maps, self.thresholds, contours=self.contours, normalize=self.normalize, backend=self.backend
        )
        best = best_iou_at_thresholds(found, truth, num_thresholds=len(self.thresholds))
        located = best[:, None] >= torch.tensor(self.iou, dtype=torch.float64)[:, None]
        return located, torch.tensor(kept, dtype=torch.long)


def middle_of_best(curve: Tensor) -> int:
    """Place of the largest value; of several, the middle one."""
    best = (curve == curve.max()).nonzero().flatten()
    return int(best[len(best) // 2]) if len(best) else 0  # NaN where nothing has been seen


def _whole_boxes(boxes: Tensor, index: int) -> Tensor:
    boxes = torch.as_tensor(boxes).detach().cpu()
    boxes = boxes[None] if boxes.ndim == 1 and len(boxes) == 4 else boxes
    if boxes.numel() == 0:
        return boxes.new_zeros((0, 4), dtype=torch.long)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes[{index}] must have the shape (n, 4), got {tuple(boxes.shape)}")
    if not bool((boxes[:, :2] <= boxes[:, 2:]).all()):
        raise ValueError(f"boxes[{index}] must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got {boxes.tolist()}")
    return boxes.trunc().long() if boxes.is_floating_point() else boxes.long()


__all__ = ["BoxMetric", "Missing", "middle_of_best"]
