"""One look at a classifier through its split: features, last map and logits of a batch, the model as it was after."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_entropy.surgery.coarse_trace import eagerly
from lightning_entropy.surgery.split_backbone import SplitBackbone
from lightning_entropy.surgery.split_classifier import split_classifier
from lightning_entropy.surgery.split_reader import SplitPass, SplitReader
from lightning_entropy.training.lightning import LightningModule
from lightning_entropy.training.probe import undisturbed


class SplitForward(NamedTuple):
    """What a batch gave.

    Args:
        backbone: the split classifier.
        seen: features at the split as they are laid out, and the autocast there.
        last_map: ``(B, C, h, w)``.
        logits: ``(B, classes)``, the mean of the class map.
    """

    backbone: SplitBackbone
    seen: SplitPass
    last_map: Tensor
    logits: Tensor


def split_forward(
    model: nn.Module, images: Tensor, split: str | SplitBackbone, *, classifier: str | None = None
) -> SplitForward:
    """Run a classifier once in evaluation mode without gradients, and read what passes its split.

    Args:
        model: a classifier, or a module that holds one.
        images: ``(B, channels, height, width)``, as the classifier takes them.
        split: dotted name of the module whose input is the split, or a classifier that is split already, which saves
            the split and its check.
        classifier: dotted name of the linear layer that gives the logits; None: the last one that runs.

    Raises:
        ValueError: if the images have another shape, or the classifier cannot be split there.
    """
    check_images(images)
    backbone = split
    if isinstance(backbone, str):
        shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        backbone, _ = split_classifier(model, backbone, classifier=classifier, input_shape=shape)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    whole = model if has_forward(model) else backbone.model
    with undisturbed(whole), SplitReader(backbone, always=True) as reader:
        eagerly(lambda: whole(images))  # compiled code does not run hooks that came later
        if len(reader.passes) != 1:
            raise ValueError(
                f"{backbone.split} of {type(backbone.model).__name__} ran {len(reader.passes)} times in one forward of "
                f"{type(whole).__name__}, and must run once. Pass the classifier itself as the model."
            )
        seen = reader.passes[0]
        with seen.precision():
            last_map = reader.last_map(seen)
            logits = backbone.logits(last_map, frozen=True)
    return SplitForward(backbone, seen, last_map, logits.float() if logits.dtype != torch.float64 else logits)


def has_forward(model: nn.Module) -> bool:
    """Whether a module defines what calling it does."""
    return type(model).forward not in (nn.Module.forward, LightningModule.forward)


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of images.

    Raises:
        ValueError: if the shape is not ``(B, channels, height, width)``.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point (batch, channels, height, width), got {tuple(images.shape)} {images.dtype}"
        )


__all__ = ["SplitForward", "check_images", "has_forward", "split_forward"]
