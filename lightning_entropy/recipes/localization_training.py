"""What changes images and labels of a classifier in training, and the loss of both kinds of labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from lightning_entropy.extras import require
from lightning_entropy.functional import multi_label_cross_entropy
from lightning_entropy.functional.hide_and_seek import hide_and_seek

Augmentation = Literal["none", "hide_and_seek", "cutmix"]
Augment = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def make_augmentation(name: str, **options: Any) -> Augment:
    """What is done to a batch before the classifier sees it.

    Args:
        name: ``"none"``; ``"hide_and_seek"``, which hides patches; ``"cutmix"``, which pastes a part of another image
            and mixes the labels by area.
        **options: of :func:`lightning_entropy.localization.hide_and_seek`, or ``alpha`` of CutMix.

    Returns:
        A function of images, labels and the number of classes that returns images and labels; those of CutMix are
        shares, ``(B, classes)``.

    Raises:
        ValueError: if there is none of that name, or it takes no such option.

    Example:
        >>> images, labels = make_augmentation("none")(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), 2)
    """
    if name not in get_args(Augmentation):
        raise ValueError(f"augmentation must be one of {', '.join(get_args(Augmentation))}, got {name!r}")
    if name == "hide_and_seek":
        return lambda images, labels, classes: (hide_and_seek(images, **options), labels)
    known = ("alpha",) if name == "cutmix" else ()
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"augmentation={name!r} takes {', '.join(known) or 'no options'}, got {', '.join(unknown)}")
    if name == "none":
        return lambda images, labels, classes: (images, labels)
    transforms = require("torchvision.transforms.v2", extra="vision")

    def cut_and_mix(images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        mixed: tuple[Tensor, Tensor] = transforms.CutMix(num_classes=classes, **options)(images, labels)
        return mixed

    return cut_and_mix


def classification_loss(logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of labels ``(B,)``, of mixed ones ``(B, classes)``, or of several an image.

    Shares that add up to one label in every image are mixed labels; zeros and ones are several labels, of which each
    competes with the absent classes alone (:func:`lightning_entropy.functional.multi_label_cross_entropy`).
    """
    if target.ndim == 1 or bool(target.frac().any()):
        return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    return multi_label_cross_entropy(logits, target)


__all__ = ["Augment", "Augmentation", "classification_loss", "make_augmentation"]
