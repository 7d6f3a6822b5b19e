"""Evaluation of a classifier's maps within Lightning's loops: which maps, which thresholds, which pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.functional import multi_label_cross_entropy
from lightning_entropy.functional.localization_boxes import Contours
from lightning_entropy.localization import BackgroundActivationSuppression, draw_localization, map_boxes
from lightning_entropy.recipes.from_data import datamodule_of
from lightning_entropy.recipes.image_classifier import ImageClassifier
from lightning_entropy.recipes.localization_maps import LEARNED, map_kind, named_maps
from lightning_entropy.recipes.localization_scores import MapScores, Thresholds
from lightning_entropy.recipes.segmentation_scores import SegmentationScores, present_maps
from lightning_entropy.surgery.split_backbone import SplitBackbone
from lightning_entropy.surgery.split_classifier import split_classifier
from lightning_entropy.training.figures import log_figure
from lightning_entropy.training.lightning import rank_zero_warn

Stage = Literal["val", "test"]
_KEPT = "localization_thresholds"  # in checkpoints
DEFAULT_THRESHOLD = 0.2  # of the maximum, as in the first paper on CAM


class Located(NamedTuple):
    """An image to be drawn."""

    name: str
    image: Tensor
    map: Tensor
    truth: Tensor


class LocalizationEvaluation(ImageClassifier):
    """A classifier whose maps are evaluated beside its labels.

    A subclass sets what is annotated here. ``thresholds`` are those of the last validation images that were seen.
    """

    split: str | None
    classifier_name: str | None
    in_channels: int | None
    num_classes: int | None
    image_size: int | None
    maps: Sequence[str]
    predicted_map: str | None
    contours: Contours
    interval: float
    localize_every_n_epochs: int
    pictures: int

    def __init__(self, **training: Any) -> None:
        super().__init__(**training)
        self.thresholds: dict[str, Thresholds | float] = {}
        self._scores: MapScores | SegmentationScores | None = None
        self._located: list[Located] = []
        self._halves: tuple[nn.Module, SplitBackbone] | None = None

    # The maps.

    def suppression(self) -> BackgroundActivationSuppression | None:
        """The callback among the Trainer's, or None."""
        try:
            callbacks: Sequence[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        except RuntimeError:  # Lightning's answer outside a Trainer
            return None
        return next((c for c in callbacks if isinstance(c, BackgroundActivationSuppression)), None)

    def evaluated_maps(self) -> list[str]:
        """Those of ``maps`` that there are: without the callback none of BAS; to segment, those of single classes."""
        kinds = {name: map_kind(name) for name in self.maps}
        if self.suppression() is None:
            kinds = {name: kind for name, kind in kinds.items() if kind.method != "bas"}
        if self._multilabel():
            kinds = {name: kind for name, kind in kinds.items() if kind.method in LEARNED and kind.top_k is None}
        return list(kinds)

    def chosen_map(self) -> str:
        """The map that is drawn and predicted with."""
        if self.predicted_map is not None:
            return self.predicted_map
        return "cam" if self.suppression() is None else "bas" if self._multilabel() else "bas_mean"

    def halves(self) -> SplitBackbone:
        """The backbone, split: by the callback where there is one.

        Raises:
            ValueError: if ``split`` is not known, or the backbone cannot be split there.
        """
        callback = self.suppression()
        if callback is not None and callback.backbone is not None:
            return callback.backbone
        assert self.net is not None
        if self._halves is None or self._halves[0] is not self.net:
            if self.split is None:
                raise ValueError(
                    f"{type(self).__name__} needs split= for CAM, a module of {type(self.net).__name__} at whose input "
                    "it is split (layer4 of a ResNet, stages.3 of a ConvNeXt, blocks.9 of a ViT with average pooling)"
                )
            size = int(self.image_size or 0)
            shape = (int(self.in_channels or 3), size, size)
            made, _ = split_classifier(self.net, self.split, classifier=self.classifier_name, input_shape=shape)
            self._halves = self.net, made
        return self._halves[1]

    def score_maps(
        self, images: Tensor, *, labels: Tensor | None = None, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Maps of images, at their size.

        Args:
            images: ``(B, C, H, W)``.
            labels: the classes whose maps are wanted, ``(B,)`` or ``(B, n)``; None: the predicted ones.
            names: which maps; None for those that evaluation takes.

        Returns:
            name -> ``(B, 1, H, W)`` float32; ``(B, n, H, W)`` for labels ``(B, n)``.
        """
        assert self.net is not None
        return named_maps(
            self.evaluated_maps() if names is None else names,
            images,
            labels,
            model=self.net,
            classes=int(self.num_classes or 1),
            halves=self.halves,
            suppression=self.suppression(),
        )

    # Lightning's loops.

    def on_validation_epoch_start(self) -> None:
        """Judge the maps in this validation, where it is due."""
        self._scores = self._new_scores() if self._due() else None

    def on_test_start(self) -> None:
        """Choose thresholds on the validation images."""
        self.fit_thresholds()

    def on_test_epoch_start(self) -> None:
        """Judge the maps."""
        self._scores = self._new_scores()

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Add a batch to the validation metrics."""
        self._judge(batch, self._evaluated(batch, self.val_metrics))

    def test_step(self, batch: Any, batch_index: int) -> None:
        """Add a batch to the test metrics."""
        self._judge(batch, self._evaluated(batch, self.test_metrics))

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics; keep the thresholds."""
        super().on_validation_epoch_end()
        if self._scores is not None:
            self.thresholds |= self._scores.fit()
            self._report_maps("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        super().on_test_epoch_end()
        if self._scores is not None:
            own = self._scores.use(self.thresholds)
            if own and self._scores.compute():
                rank_zero_warn(
                    f"{type(self).__name__}: there are no validation images with boxes, so the thresholds of "
                    f"{', '.join(own)} are the best ones of the test images: these figures are optimistic."
                )
                self._scores.fit()
            self._report_maps("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the thresholds, as plain numbers."""
        checkpoint[_KEPT] = {
            name: [kept.gt_known, list(kept.max_box_v2)] if isinstance(kept, Thresholds) else kept
            for name, kept in self.thresholds.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the thresholds."""
        for name, kept in checkpoint.get(_KEPT, {}).items():
            self.thresholds[name] = Thresholds(kept[0], tuple(kept[1])) if isinstance(kept, list) else kept

    def fit_thresholds(self) -> None:
        """Choose the thresholds of the maps with the present weights, by a pass over the validation images."""
        scores = self._new_scores()
        with self.trainer.precision_plugin.val_step_context():
            for batch in self.validation_batches():
                if "boxes" not in batch:
                    return
                self._add(scores, batch, self.logits(batch).float(), self._maps_of(batch))
        self.thresholds |= scores.fit()

    def validation_batches(self) -> Iterator[dict[str, Any]]:
        """The validation images on the module's device, as many as the Trainer validates with."""
        datamodule = datamodule_of(self)
        loader: Any = None if datamodule is None else datamodule.val_dataloader()
        if not loader:
            return
        limit = self.trainer.limit_val_batches
        count = limit if isinstance(limit, int) else int(limit * len(loader))
        for batch in itertools.islice(loader, count):
            yield self.trainer.strategy.batch_to_device(batch)

    def threshold(self, name: str) -> float:
        """Where the box of a map is cut; 0.2 where no validation image has said it."""
        kept = self.thresholds.get(name, DEFAULT_THRESHOLD)
        return kept.gt_known if isinstance(kept, Thresholds) else float(kept)

    def _maps_of(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Of the true class, since GT-known asks for it, or to segment of all."""
        labels: Tensor = batch["label"]
        if labels.ndim == 2:
            labels = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
        return self.score_maps(batch["image"], labels=labels)

    # What they share.

    def _due(self) -> bool:
        trainer = self.trainer
        if trainer.sanity_checking:
            return False
        every, epoch = self.localize_every_n_epochs, self.current_epoch + 1
        if trainer.state.fn == "fit":
            return bool(every) and (epoch % every == 0 or epoch == trainer.max_epochs)
        return True

    def _multilabel(self) -> bool:
        return bool(getattr(datamodule_of(self), "multilabel", False))

    def _new_scores(self) -> MapScores | SegmentationScores:
        self._located = []
        if self._multilabel():
            return SegmentationScores(self.evaluated_maps(), classes=int(self.num_classes or 1), device=self.device)
        return MapScores(self.evaluated_maps(), contours=self.contours, interval=self.interval, device=self.device)

    def _evaluated(self, batch: Any, metrics: Any) -> Tensor:
        logits, label = self.logits(batch).float(), batch["label"]
        first = logits.argmax(dim=1)
        if label.ndim == 1:
            right, loss = first == label, F.cross_entropy(logits, label, reduction="none")
        else:  # whether the likeliest class is among an image's
            right, loss = label.gather(1, first[:, None])[:, 0] > 0.5, multi_label_cross_entropy(logits, label)
        metrics["accuracy"].update((right & logits.isfinite().all(dim=1)).float())
        metrics["loss"].update(loss)
        return logits

    def _judge(self, batch: Mapping[str, Any], logits: Tensor) -> None:
        if self._scores is None or "boxes" not in batch or not bool(logits.isfinite().all()):
            return
        maps = self._maps_of(batch)
        self._add(self._scores, batch, logits, maps)
        shown = maps.get(self.chosen_map())
        if shown is not None and batch["label"].ndim == 2:
            shown = present_maps(shown, batch["label"]).amax(1, keepdim=True)
        for i, boxes in enumerate(batch["boxes"]):
            if shown is not None and len(self._located) < self.pictures and len(boxes):
                self._located.append(Located(batch["name"][i], batch["image"][i].cpu(), shown[i, 0].cpu(), boxes.cpu()))

    def _add(
        self, scores: MapScores | SegmentationScores, batch: Mapping[str, Any], logits: Tensor, maps: dict[str, Tensor]
    ) -> None:
        if isinstance(scores, MapScores):
            scores.update(maps, batch["boxes"], logits, batch["label"], batch.get("mask"))
        elif "mask" in batch:
            scores.update(maps, batch["label"], batch["mask"])

    def _report_maps(self, stage: Stage) -> None:
        assert self._scores is not None
        for name, value in self._scores.compute().items():
            self.log(f"{stage}/{name}", value)  # added over all processes already
        if self._located and self.trainer.loggers:
            log_figure(self.trainer, f"{stage}/localization", self._drawn())
        self._scores, self._located = None, []

    def _drawn(self) -> Any:
        images, maps = (torch.stack([getattr(one, key) for one in self._located]) for key in ("image", "map"))
        return draw_localization(
            self.shown(images),
            maps,
            map_boxes(maps, threshold=self.threshold(self.chosen_map()), contours=self.contours),
            [one.truth for one in self._located],
            titles=[one.name for one in self._located],
            columns=2,
        )

    def shown(self, images: Tensor) -> Tensor:
        """Images in [0, 1], as the datamodule says, or each stretched between its extremes."""
        denormalize = getattr(datamodule_of(self), "denormalize", None)
        if denormalize is not None:
            return denormalize(images)  # type: ignore[no-any-return]
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        return (images - low) / (high - low).clamp(min=1e-8)


__all__ = ["DEFAULT_THRESHOLD", "LocalizationEvaluation"]
