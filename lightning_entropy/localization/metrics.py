"""Accuracy of localization by boxes, as torchmetrics that equal the official evaluator.

Choe et al., *Evaluating Weakly Supervised Object Localization Methods Right*, CVPR 2020 (arXiv 2001.07437): a score map
gives boxes at every threshold; an image counts as located at a threshold if a box overlaps a true one enough; the
accuracy is that of the best threshold. With one threshold for all images, that is: not the best threshold of each.

The best threshold of the very images that are scored is optimistic. `fit_threshold` takes it from a validation set:

    val.update(val_maps, val_boxes)
    test.threshold = val.fit_threshold()

Every state is a sum of integers, so batches and processes add up exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_entropy.arguments import check_types
from lightning_entropy.functional.localization_boxes import Backend, Contours
from lightning_entropy.training.box_metric import BoxMetric, Missing


class MaxBoxAccuracy(BoxMetric):
    """Share of images whose largest box overlaps a true one, at the best threshold (MaxBoxAcc).

    The box is that of the contour around the largest area. ``compute`` returns ``max_box_accuracy`` and ``threshold``,
    or ``box_accuracy`` and ``threshold`` where the threshold is fixed; shares, where the official code prints percent.

    Args:
        iou: overlap from which on an image counts as located.
        interval: distance of the thresholds, ``0, interval, ...`` below 1.
        threshold: one threshold to use instead of the best one of the data.
        contours: ``"largest"`` contour, or ``"largest_component"`` by number of pixels, as in BAS.
        normalize: scale each map to [0, 1]; otherwise it must be in [0, 1] already.
        without_box: ``"error"`` or ``"skip"`` for images without a true box.
        backend: see `lightning_entropy.functional.boxes_at_thresholds`.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: if an argument is outside its range.

    Reference:
        Choe et al., CVPR 2020, arXiv 2001.07437, section 3.

    Example:
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 1:4] = 1
        >>> metric = MaxBoxAccuracy()
        >>> metric.update(maps, [torch.tensor([[1, 2, 4, 5]])])
        >>> metric.compute()["max_box_accuracy"]
        tensor(1.)
    """

    def __init__(
        self,
        *,
        iou: float = 0.5,
        interval: float = 0.001,
        threshold: float | None = None,
        contours: Contours = "largest",
        normalize: bool = True,
        without_box: Missing = "error",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_types(MaxBoxAccuracy, locals())
        super().__init__(
            iou=(iou,),
            contours=contours,
            interval=interval,
            threshold=threshold,
            normalize=normalize,
            without_box=without_box,
            backend=backend,
            **kwargs,
        )

    def update(self, maps: Tensor, boxes: Sequence[Tensor] | Tensor) -> None:
        """Add a batch.

        Args:
            maps: score maps of the true class, ``(B, H, W)`` or ``(B, 1, H, W)``, at the size in which they are judged
                (224 x 224 in the published protocols).
            boxes: for each image its true boxes ``(n, 4)``, ``x0, y0, x1, y1`` in pixels of the map
                (`lightning_entropy.functional.scale_boxes`); fractions are cut off.
        """
        located, _ = self.located(maps, boxes)
        self.count(located)

    def compute(self) -> dict[str, Tensor]:
        """Accuracy and threshold."""
        accuracy, threshold = self.accuracies()
        return {f"{self.best_prefix()}box_accuracy": accuracy[0], "threshold": threshold[0]}


class MaxBoxAccuracyV2(BoxMetric):
    """MaxBoxAccV2: any box of any contour counts, averaged over three overlaps, each at its own best threshold.

    ``compute`` returns the mean ``max_box_accuracy_v2``, and for every overlap ``max_box_accuracy_30`` and
    ``threshold_30`` (in percent); without ``max_`` where the thresholds are fixed.

    Args:
        iou: overlaps from which on an image counts as located.
        interval: distance of the thresholds, ``0, interval, ...`` below 1.
        threshold: one threshold, or one for each overlap, to use instead of the best ones of the data.
        normalize: scale each map to [0, 1]; otherwise it must be in [0, 1] already.
        without_box: ``"error"`` or ``"skip"`` for images without a true box.
        backend: see `lightning_entropy.functional.boxes_at_thresholds`.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: if an argument is outside its range.

    Reference:
        Choe et al., CVPR 2020, arXiv 2001.07437; Choe et al., TPAMI 2022, arXiv 2007.04178.

    Example:
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 1:4] = 1
        >>> metric = MaxBoxAccuracyV2()
        >>> metric.update(maps, [torch.tensor([[1, 2, 3, 6]])])
        >>> values = metric.compute()
        >>> values["max_box_accuracy_v2"], values["max_box_accuracy_70"]
        (tensor(0.6667), tensor(0.))
    """

    def __init__(
        self,
        *,
        iou: Sequence[float] = (0.3, 0.5, 0.7),
        interval: float = 0.001,
        threshold: float | Sequence[float] | None = None,
        normalize: bool = True,
        without_box: Missing = "error",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_types(MaxBoxAccuracyV2, locals())
        super().__init__(
            iou=iou,
            contours="all",
            interval=interval,
            threshold=threshold,
            normalize=normalize,
            without_box=without_box,
            backend=backend,
            **kwargs,
        )

    def update(self, maps: Tensor, boxes: Sequence[Tensor] | Tensor) -> None:
        """Add a batch; see `MaxBoxAccuracy.update`."""
        located, _ = self.located(maps, boxes)
        self.count(located)

    def compute(self) -> dict[str, Tensor]:
        """Mean accuracy, and accuracy and threshold of each overlap."""
        accuracy, threshold = self.accuracies()
        values = {f"{self.best_prefix()}box_accuracy_v2": accuracy.mean()}
        for iou, one in zip(self.iou, accuracy):
            values[f"{self.best_prefix()}box_accuracy_{100 * iou:g}"] = one
        return values | {f"threshold_{100 * iou:g}": one for iou, one in zip(self.iou, threshold)}


class GTKnownLocalization(MaxBoxAccuracy):
    """Share of images that are located, given the map of the true class: GT-known.

    It does not ask whether the class was recognised. ``compute`` returns ``gt_known`` and ``threshold``. Papers report
    it at a fixed threshold, often one that was chosen on the test set; with ``threshold=None`` it is the best one of
    the data, and then it equals `MaxBoxAccuracy`.

    Args:
        threshold: threshold relative to the maximum of each map; 0.2 in Zhou et al., *Learning Deep Features for
            Discriminative Localization*, CVPR 2016; ``None`` for the best one of the data.
        iou: overlap from which on an image counts as located.
        interval: distance of the thresholds where none is given.
        contours: ``"largest"`` contour, or ``"largest_component"`` by number of pixels, as in BAS.
        normalize: scale each map to [0, 1]; otherwise it must be in [0, 1] already.
        without_box: ``"error"`` or ``"skip"`` for images without a true box.
        backend: see `lightning_entropy.functional.boxes_at_thresholds`.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 1:4] = 1
        >>> metric = GTKnownLocalization(threshold=0.2)
        >>> metric.update(maps, [torch.tensor([[1, 2, 4, 5]])])
        >>> metric.compute()
        {'gt_known': tensor(1.), 'threshold': tensor(0.2000)}
    """

    def compute(self) -> dict[str, Tensor]:
        """Accuracy and threshold."""
        accuracy, threshold = self.accuracies()
        return {"gt_known": accuracy[0], "threshold": threshold[0]}


__all__ = ["GTKnownLocalization", "MaxBoxAccuracy", "MaxBoxAccuracyV2"]
