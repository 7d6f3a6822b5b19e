"""A classifier of images whose maps are judged against boxes and masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from lightning_entropy.arguments import check_types
from lightning_entropy.functional.localization_boxes import Contours
from lightning_entropy.recipes.classifier import Decay
from lightning_entropy.recipes.from_data import take_from_data
from lightning_entropy.recipes.localization_evaluation import LocalizationEvaluation
from lightning_entropy.recipes.localization_maps import map_kind
from lightning_entropy.recipes.localization_models import SMALL, make_classifier
from lightning_entropy.recipes.localization_predictions import predicted_batch, write_localizations
from lightning_entropy.recipes.localization_training import Augmentation, classification_loss, make_augmentation

Optimizer = Literal["adamw", "sgd"]
MAPS = ("cam", "cam_mean", "bas", "bas_mean", "centre_gaussian", "whole_image")


class ImageLocalizer(LocalizationEvaluation):
    r"""One label for an image, or several, and where its object is.

    Batches are those of :class:`~lightning_entropy.data.LocalizationSet`. Training minimises the cross-entropy of image
    labels and sees no box; :class:`~lightning_entropy.BackgroundActivationSuppression` among the Trainer's callbacks
    adds its loss and its maps. Evaluation logs ``stage/loss`` and ``stage/accuracy`` for ``stage`` in ``val`` and
    ``test``, and for each of ``maps`` ``stage/MAP/gt_known``, ``stage/MAP/top1_loc``, ``stage/MAP/max_box_v2`` and,
    where there are masks, ``stage/MAP/pxap``. Where images have several labels and masks of classes it logs
    ``stage/MAP/miou`` instead.

    Thresholds of the maps are the best ones of the validation images. Testing and predicting choose them again with the
    weights that are tested, by a pass over the validation images; without such images they are those of the
    checkpoint's last validation, and without these the best ones of the test images, which a warning says.

    Args:
        backbone: ``"small_bn_cnn"`` (for small images), ``"timm:NAME"`` or ``"torchvision:NAME"``, or a module from
            ``(B, C, H, W)`` to logits ``(B, classes)``.
        split: the module of the backbone at whose input it is split for CAM; None for that of the callback, or of
            ``small_bn_cnn``.
        classifier: the linear layer that gives the logits; None: the last one that runs.
        in_channels: number of channels; None takes it from the Trainer's datamodule.
        num_classes: number of classes; None takes it from the Trainer's datamodule.
        image_size: height and width of the images; None takes it from the Trainer's datamodule.
        pretrained: with the weights that timm or torchvision downloads.
        backbone_kwargs: more arguments of the model.
        augmentation: ``"none"``; ``"hide_and_seek"``, which hides patches of training images; ``"cutmix"``, which
            pastes a part of another image. CutMix mixes labels, so it does not go with BAS.
        augmentation_kwargs: arguments of :func:`~lightning_entropy.localization.hide_and_seek`, or ``alpha`` of CutMix.
        maps: what is evaluated: ``cam``, ``grad_cam``, ``layer_cam`` and ``bas`` are of the label's class,
            ``cam_mean`` is averaged over all classes, ``cam_top5`` over the 5 likeliest, and ``centre_gaussian`` and
            ``whole_image`` know nothing. Those of BAS are left out where the callback is absent.
        contours: which box of a map counts for GT-known and Top-1.
        interval: distance of the thresholds.
        localize_every_n_epochs: how often validation within a fit evaluates the maps; the last epoch always does. 0
            never.
        predicted_map: which map ``predict`` takes; None for ``bas_mean`` with the callback, ``cam`` without it.
        pictures: images that are drawn with their maps in each evaluation.
        overlays: images that ``predict`` draws.
        lr: learning rate.
        weight_decay: of AdamW on weight matrices, of SGD on everything.
        warmup_steps: steps over which the learning rate rises linearly; 0 for none.
        decay: ``"constant"``, or ``"cosine"`` for half a cosine to 0 over the steps of the run.
        label_smoothing: share of the target, in training, that is spread over all classes.
        optimizer: ``"adamw"``, or ``"sgd"`` with Nesterov momentum 0.9 and twice the rate on biases, as BAS has it.
        head_lr_factor: factor of the learning rate of the classifier's last layer.
        decay_epochs: epochs after which the learning rate is divided by 10, instead of ``warmup_steps`` and ``decay``.

    Raises:
        ValueError: if an argument is out of its range or unknown; from ``configure_model``, if the sizes are not known
            or the backbone cannot be made; in evaluation, if it cannot be split.
        ImportError: if timm or torchvision (extra ``vision``) is needed and not installed.

    Example:
        >>> localizer = ImageLocalizer(in_channels=3, num_classes=4, image_size=64)
        >>> localizer(torch.zeros(1, 3, 64, 64)).shape, localizer.split
        (torch.Size([1, 4]), 'stages.2')
    """

    advice: ClassVar[str] = "A smaller lr or warmup_steps may help."

    def __init__(
        self,
        backbone: str | nn.Module = SMALL,
        *,
        split: str | None = None,
        classifier: str | None = None,
        in_channels: int | None = None,
        num_classes: int | None = None,
        image_size: int | None = None,
        pretrained: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
        augmentation: Augmentation = "none",
        augmentation_kwargs: dict[str, Any] | None = None,
        maps: Sequence[str] = MAPS,
        contours: Contours = "largest_component",
        interval: float = 0.01,
        localize_every_n_epochs: int = 1,
        predicted_map: str | None = None,
        pictures: int = 4,
        overlays: int = 32,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay: Decay = "constant",
        label_smoothing: float = 0.0,
        optimizer: Optimizer = "adamw",
        head_lr_factor: float = 1.0,
        decay_epochs: Sequence[int] = (),
    ) -> None:
        training: dict[str, Any] = {"warmup_steps": warmup_steps, "decay": decay, "label_smoothing": label_smoothing}
        check_types(ImageLocalizer, locals())
        super().__init__(lr=lr, weight_decay=weight_decay, **training)
        if not isinstance(backbone, str) and (pretrained or backbone_kwargs):
            raise ValueError("pretrained and backbone_kwargs are for a backbone given by name; this one exists already")
        for name, count in (("localize_every_n_epochs", localize_every_n_epochs), ("pictures", pictures)):
            if count < 0:
                raise ValueError(f"{name} must be at least 0, got {count}")
        if optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer must be adamw or sgd, got {optimizer!r}")
        if not head_lr_factor > 0:
            raise ValueError(f"head_lr_factor must be positive, got {head_lr_factor}")
        if decay_epochs and (warmup_steps or decay != "constant"):
            raise ValueError("decay_epochs divides the learning rate in steps: leave warmup_steps and decay alone then")
        for name in (*maps, *([predicted_map] if predicted_map else [])):
            map_kind(name)  # an unknown name is an error here, not after training
        self.save_hyperparameters(ignore=[] if isinstance(backbone, str) else ["backbone"])
        self.split, self.classifier_name = split, classifier
        self.in_channels, self.num_classes, self.image_size = in_channels, num_classes, image_size
        self._name = backbone if isinstance(backbone, str) else None
        self._pretrained, self._backbone_kwargs = pretrained, dict(backbone_kwargs or {})
        self.augmentation = augmentation
        self._augment = make_augmentation(augmentation, **(augmentation_kwargs or {}))
        self.maps, self.contours, self.interval = list(maps), contours, interval
        self.localize_every_n_epochs, self.predicted_map = int(localize_every_n_epochs), predicted_map
        self.pictures, self.overlays = int(pictures), int(overlays)
        self.optimizer_name, self.head_lr_factor, self.decay_epochs = optimizer, head_lr_factor, list(decay_epochs)
        self.overlays_left = self.overlays
        self.net: nn.Module | None = backbone if isinstance(backbone, nn.Module) else None
        if None not in (in_channels, num_classes, image_size):
            self.configure_model()

    def configure_model(self) -> None:
        """Build the model, once; Lightning calls it when the datamodule is ready."""
        take_from_data(self, "in_channels", "num_classes", "image_size", fit_with="LocalizationSet")
        if self.net is None:
            self.net = make_classifier(
                str(self._name),
                in_channels=int(self.in_channels or 0),
                classes=int(self.num_classes or 0),
                pretrained=self._pretrained,
                options=self._backbone_kwargs,
            )
        if self.split is None:
            self.split = getattr(self.net, "split", None)

    def on_fit_start(self) -> None:
        """Refuse CutMix beside BAS."""
        super().on_fit_start()
        if self.augmentation == "cutmix" and self.suppression() is not None:
            raise ValueError(
                "augmentation='cutmix' mixes the labels of an image, and BackgroundActivationSuppression needs one "
                "label for a map: leave out one of the two"
            )

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """The loss of a batch; one that is not finite ends the run."""
        image, target = self._augment(batch["image"], batch["label"], int(self.num_classes or 0))
        loss = classification_loss(self(image), target, label_smoothing=self.label_smoothing)
        self.stop_if_diverged(loss.detach())
        shown: dict[str, Any] = {"prog_bar": True, "sync_dist": True, "batch_size": len(batch["label"])}
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True, **shown)
        return loss

    # The optimizer.

    def _last_layer(self) -> str:
        assert self.net is not None
        linear = [n for n, m in self.net.named_modules() if isinstance(m, nn.Linear)]
        return f"net.{self.classifier_name or (linear[-1] if linear else '')}"

    def rate_of(self, name: str) -> float:
        """More on the last layer, and twice the rate on biases under SGD."""
        rate = self.lr * (self.head_lr_factor if name.startswith(f"{self._last_layer()}.") else 1.0)
        return 2 * rate if self.optimizer_name == "sgd" and name.endswith("bias") else rate

    def build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW as of every recipe, or SGD."""
        if self.optimizer_name == "adamw":
            return super().build_optimizer()
        groups = [{key: value for key, value in group.items() if key != "weight_decay"} for group in self._groups()]
        momentum: dict[str, Any] = {"momentum": 0.9, "nesterov": True}
        return torch.optim.SGD(groups, lr=self.lr, weight_decay=self.weight_decay, **momentum)

    def configure_optimizers(self) -> Any:
        """The optimizer; the learning rate in steps where asked for."""
        built = super().configure_optimizers()
        if self.decay_epochs:
            built["lr_scheduler"] = MultiStepLR(built["optimizer"], self.decay_epochs, gamma=0.1)
        return built

    # Prediction.

    def on_predict_start(self) -> None:
        """Choose thresholds on the validation images; begin drawing anew."""
        self.fit_thresholds()
        self.overlays_left = self.overlays

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        """Probabilities and boxes of a batch.

        Returns:
            ``name``; ``probabilities`` ``(B, classes)``; ``boxes``: for each image ``(n, 4)``, in pixels of the
            original; ``size`` ``(B, 2)``, its height and width; and ``pictures`` of the first ``overlays`` images:
            ``name``, ``images``, ``maps``, ``boxes`` and, where known, ``truth``, in pixels of what the model saw.
        """
        return predicted_batch(self, batch)

    def write_predictions(
        self, predictions: Sequence[dict[str, Any]], path: str | os.PathLike[str], *, classes: Sequence[str] | None
    ) -> list[Path]:
        """Write classes, boxes and overlays; what ``lightning-entropy predict`` calls.

        Args:
            predictions: what ``Trainer.predict`` returned.
            path: the CSV file ``STEM.csv``; boxes go into ``STEM.json`` beside it (COCO), overlays into the folder
                ``STEM``.
            classes: their names.

        Returns:
            What was written.
        """
        return write_localizations(predictions, path, classes=classes)


__all__ = ["MAPS", "ImageLocalizer"]
