"""Accuracy of localization by pixels: precision and recall of score maps, and overlap of segmentations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_entropy.arguments import check_types
from lightning_entropy.functional import (
    pixel_average_precision,
    pixel_precision_recall,
    protocol_thresholds,
    score_histograms,
)
from lightning_entropy.training.figures import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class PixelAveragePrecision(Metric):
    """PxAP: area under the precision-recall curve of the pixels of all images together.

    ``compute`` returns ``pixel_average_precision``, and ``peak_iou``, the largest intersection over union of object
    pixels at one threshold of all images, with its ``threshold``. A constant map scores the share of object pixels.

    Args:
        interval: width of the bins of the scores.
        normalize: scale each map to [0, 1]; otherwise it must be in [0, 1] already.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: if ``interval`` is not in (0, 1]; on ``compute``, if no pixel belongs to an object.

    Reference:
        Choe et al., CVPR 2020, arXiv 2001.07437.

    Example:
        >>> metric = PixelAveragePrecision()
        >>> metric.update(torch.tensor([[[0.0, 0.3], [0.8, 1.0]]]), torch.tensor([[[0, 0], [1, 1]]]))
        >>> metric.compute()["pixel_average_precision"]
        tensor(1.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    histograms: Tensor

    def __init__(self, *, interval: float = 0.001, normalize: bool = True, **kwargs: Any) -> None:
        check_types(PixelAveragePrecision, locals())
        super().__init__(**kwargs)
        self.interval, self.normalize = interval, normalize
        bins = len(protocol_thresholds(interval)) + 2
        self.add_state("histograms", torch.zeros((2, bins), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add a batch.

        Args:
            maps: score maps, ``(B, H, W)`` or ``(B, 1, H, W)``, at the size of the masks.
            masks: 1 for object, 0 for background, anything else (255) for pixels that are not judged.
        """
        counts = score_histograms(maps, masks, interval=self.interval, normalize=self.normalize)
        self.histograms += counts.to(self.histograms.device)

    def compute(self) -> dict[str, Tensor]:
        """Area under the curve, peak IoU and its threshold."""
        device = self.histograms.device
        self.curve = pixel_precision_recall(self.histograms)
        true, false = self.histograms.flip(-1).cumsum(-1).flip(-1)
        iou = true / (true[0] + false)
        best = int(iou.argmax())
        threshold = float([*protocol_thresholds(self.interval), 1.0, 2.0][best])
        return {
            "pixel_average_precision": pixel_average_precision(self.histograms).float().to(device),
            "peak_iou": iou[best],
            "threshold": torch.tensor(threshold, device=device),
        }

    def plot(self, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw precision against recall; in several processes every one must call this.

        Args:
            ax: axes to draw on; ``None`` for a new figure.
        """
        figure, axes = axes_or_new(ax)
        area = self.compute()["pixel_average_precision"].item()
        precision, recall = self.curve
        axes.step(recall.numpy(), precision.numpy(), where="pre")
        axes.set(xlabel="recall of object pixels", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(f"PxAP {area:.3f}", fontsize=10)
        return figure, axes


class SegmentationIoU(Metric):
    """Intersection over union of segmented classes, averaged over the classes (mIoU).

    ``compute`` returns ``miou`` and ``iou_0``, ``iou_1`` ...; classes that are neither true nor predicted anywhere are
    left out of the mean. Given ``background_thresholds``, `update` takes maps of the object classes instead of labels:
    a pixel has the class of its highest map if that is above the threshold, else background (class 0), and ``compute``
    also returns the ``threshold`` of the best ``miou``.

    Args:
        num_classes: number of classes, background included.
        ignore_index: true label of pixels that are not judged; 255 in PASCAL VOC.
        background_thresholds: ascending thresholds to choose from; one fixes it.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: if there are fewer than two classes, or thresholds do not ascend.

    Example:
        >>> metric = SegmentationIoU(2)
        >>> metric.update(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 0, 1]]]))
        >>> metric.compute()["miou"]
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        background_thresholds: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2 (background counts as one), got {num_classes}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.background_thresholds = None
        rows = 1
        if background_thresholds is not None:
            levels = torch.as_tensor(background_thresholds, dtype=torch.float64)
            if levels.ndim != 1 or not len(levels) or not bool((levels.diff() > 0).all()):
                raise ValueError(f"background_thresholds must ascend, got {background_thresholds}")
            self.background_thresholds = levels
            rows = len(levels) + 1
        # Given thresholds: pixels by the number of thresholds below their score, highest class and true class.
        size = (rows, num_classes, num_classes)
        self.add_state("counts", torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: labels ``(B, H, W)``, or scores ``(B, C, H, W)`` of all classes; with
                ``background_thresholds`` maps ``(B, C - 1, H, W)`` of the classes 1, 2, ...
            target: true labels ``(B, H, W)``.
        """
        classes = self.num_classes
        channels = classes - (self.background_thresholds is not None)
        target = target.to(prediction.device)
        shape = tuple(prediction.shape)
        labels = self.background_thresholds is None and prediction.ndim == 3
        if shape[:1] + shape[len(shape) - 2 :] != tuple(target.shape) or not (
            labels or (len(shape) == 4 and shape[1] == channels)
        ):
            raise ValueError(
                f"prediction must be ({'B, H, W) or (' if self.background_thresholds is None else ''}B, {channels}, "
                f"H, W) for target {tuple(target.shape)}, got {shape}"
            )
        rows = torch.zeros((), dtype=torch.long, device=prediction.device)
        if self.background_thresholds is not None:
            scores, place = prediction.detach().double().max(1)
            predicted = place + 1
            rows = torch.searchsorted(self.background_thresholds.to(scores.device), scores)
        else:
            predicted = prediction.long() if labels else prediction.argmax(1)
        known = target != self.ignore_index
        for name, values in (("target", target), ("prediction", predicted)):
            inside = values[known]
            if inside.numel() and (int(inside.min()) < 0 or int(inside.max()) >= classes):
                raise ValueError(
                    f"{name} must be 0 to {classes - 1} (or {self.ignore_index}, which is not judged), "
                    f"got {int(inside.min())} to {int(inside.max())}"
                )
        place = (rows * classes + predicted) * classes + target.long()
        self.counts += torch.bincount(place[known], minlength=self.counts.numel()).view_as(self.counts).to(self.device)

    def _confusion(self) -> Tensor:
        """``(thresholds, predicted, true)``."""
        if self.background_thresholds is None:
            return self.counts
        # An object class is predicted at the thresholds below the score; elsewhere the background is.
        below = self.counts.flip(0).cumsum(0).flip(0)[1:]
        confusion = below.clone()
        confusion[:, 0] = self.counts.sum((0, 1)) - below.sum(1)
        return confusion

    def compute(self) -> dict[str, Tensor]:
        """Mean over classes, and each class, at the best threshold where there are several."""
        confusion = self._confusion()
        true = confusion.diagonal(dim1=1, dim2=2)
        iou = true / (confusion.sum(1) + confusion.sum(2) - true)  # NaN for a class that is nowhere
        mean = iou.nanmean(1)
        best = int(mean.nan_to_num(-1.0).argmax())
        values = {"miou": mean[best]} | {f"iou_{index}": one for index, one in enumerate(iou[best])}
        if self.background_thresholds is not None:
            values["threshold"] = self.background_thresholds[best].float().to(self.device)
        return values

    def plot(self, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the IoU of each class; in several processes every one must call this.

        Args:
            ax: axes to draw on; ``None`` for a new figure.
        """
        figure, axes = axes_or_new(ax)
        values = {name: value.item() for name, value in self.compute().items()}
        each = [values[f"iou_{index}"] for index in range(self.num_classes)]
        axes.bar(range(self.num_classes), each)
        axes.axhline(values["miou"], color="grey", linewidth=1)
        axes.set(xlabel="class (0 is background)", ylabel="IoU", ylim=(0, 1.02), title=f"mIoU {values['miou']:.3f}")
        return figure, axes


__all__ = ["PixelAveragePrecision", "SegmentationIoU"]
