"""Accuracy of classification and localization together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.arguments import check_types
from lightning_entropy.functional.localization_boxes import Backend, Contours
from lightning_entropy.training.box_metric import BoxMetric, Missing, middle_of_best


class TopKLocalization(BoxMetric):
    """Share of images that are located and have their class among the k that score highest.

    ``compute`` returns ``top1``, ``top5`` (for ``k=(1, 5)``), ``gt_known``, and the threshold of each, such as
    ``top1_threshold``. By default each takes its best threshold; papers differ here.

    Args:
        k: one or several numbers of classes.
        iou: overlap from which on an image counts as located.
        shared_threshold: take the threshold that is best for ``gt_known`` for all.
        interval: distance of the thresholds, ``0, interval, ...`` below 1.
        threshold: one threshold to use instead of the best one of the data.
        contours: ``"largest"`` contour, or ``"largest_component"`` by number of pixels, as in BAS.
        normalize: scale each map to [0, 1]; otherwise it must be in [0, 1] already.
        without_box: ``"error"`` or ``"skip"`` for images without a true box.
        backend: see `lightning_entropy.functional.boxes_at_thresholds`.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> maps = torch.zeros(2, 8, 8)
        >>> maps[:, 2:5, 1:4] = 1
        >>> metric = TopKLocalization(k=1)
        >>> logits, target = torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1])
        >>> metric.update(maps, [torch.tensor([[1, 2, 4, 5]])] * 2, logits, target)
        >>> metric.compute()["top1"], metric.compute()["gt_known"]
        (tensor(0.5000), tensor(1.))
    """

    def __init__(
        self,
        *,
        k: int | Sequence[int] = (1, 5),
        iou: float = 0.5,
        shared_threshold: bool = False,
        interval: float = 0.001,
        threshold: float | None = None,
        contours: Contours = "largest",
        normalize: bool = True,
        without_box: Missing = "error",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_types(TopKLocalization, locals())
        self_k = (k,) if isinstance(k, int) else tuple(k)
        if not self_k or not all(value >= 1 for value in self_k):
            raise ValueError(f"k must be >= 1, got {k}")
        super().__init__(
            iou=(iou,),
            contours=contours,
            interval=interval,
            threshold=threshold,
            normalize=normalize,
            without_box=without_box,
            backend=backend,
            rows=1 + len(self_k),
            **kwargs,
        )
        self.k = self_k
        self.shared_threshold = shared_threshold

    def update(self, maps: Tensor, boxes: Sequence[Tensor] | Tensor, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            maps: score maps, ``(B, H, W)`` or ``(B, 1, H, W)``. A map of the true class leaks the label to ``top1``;
                a map of the predicted class, or averaged over classes, does not.
            boxes: see `MaxBoxAccuracy.update`.
            logits: ``(B, K)``, scores of the classes. Of equal scores the lower class counts as the higher one.
            target: ``(B,)``, the true classes.
        """
        if logits.ndim != 2 or target.shape != logits.shape[:1] or len(logits) != len(maps):
            raise ValueError(
                f"logits must be (B, K) and target (B,) for {len(maps)} maps, "
                f"got {tuple(logits.shape)} and {tuple(target.shape)}"
            )
        located, kept = self.located(maps, boxes)
        logits, target = logits.detach().cpu()[kept], target.cpu()[kept].long()
        own = logits.gather(1, target[:, None])
        earlier = torch.arange(logits.shape[1]) < target[:, None]
        rank = ((logits > own) | ((logits == own) & earlier)).sum(1)
        rank[logits.isnan().any(1)] = logits.shape[1]  # nothing is known of these
        right = torch.stack([torch.ones_like(rank, dtype=torch.bool), *(rank < k for k in self.k)], dim=1)
        self.count(located & right[:, :, None])

    def compute(self) -> dict[str, Tensor]:
        """Accuracies and thresholds."""
        accuracy, threshold = self.accuracies()
        if self.shared_threshold and self.threshold is None:
            place = middle_of_best(self.curves[0])
            accuracy, threshold = self.curves[:, place], threshold[:1].expand(len(threshold))
        names = self.labels()[1:] + self.labels()[:1]
        order = [*range(1, len(names)), 0]
        values = {name: accuracy[row] for name, row in zip(names, order)}
        return values | {f"{name}_threshold": threshold[row] for name, row in zip(names, order)}

    def labels(self) -> list[str]:
        """Names of the accuracies, for the legend."""
        return ["gt_known", *(f"top{k}" for k in self.k)]


__all__ = ["TopKLocalization"]
