"""Weights of classes in a loss over bags."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def balanced_weights(labels: Sequence[int], *, num_classes: int) -> list[float]:
    """Weights ``B / (C B_c)`` for B bags of which B_c are of class c: every class weighs the same in sum.

    Args:
        labels: classes of the training bags.
        num_classes: number of classes C.

    Raises:
        ValueError: if a class has no bag.
    """
    counts = [sum(label == c for label in labels) for c in range(num_classes)]
    if min(counts) == 0:
        raise ValueError(f"class_weights='balanced' needs a training bag of every class, the counts are {counts}")
    return [len(labels) / (num_classes * count) for count in counts]


def resolve_weights(weights: Sequence[float] | str, *, labels: Sequence[int] | None, num_classes: int) -> list[float]:
    """Turn what a user gave into one weight for each class.

    Args:
        weights: the weights, or ``"balanced"``.
        labels: classes of the training bags, for ``"balanced"``; ``None`` where they are not known.
        num_classes: number of classes.

    Raises:
        ValueError: if the labels are needed and not known, or there is not one finite weight >= 0 for each
            class.
    """
    if isinstance(weights, str):
        if weights != "balanced":
            raise ValueError(f"class_weights must be 'balanced', a list of numbers or None, got {weights!r}")
        if labels is None:
            raise ValueError(
                "class_weights='balanced' counts the training bags of the Trainer's datamodule, and there are "
                "none here: pass a list of weights instead"
            )
        return balanced_weights(labels, num_classes=num_classes)
    if len(weights) != num_classes or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ValueError(f"class_weights must be {num_classes} finite numbers >= 0, got {list(weights)}")
    return [float(w) for w in weights]


def bag_loss(logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over bags of class weight times cross-entropy.

    ``F.cross_entropy(..., weight=)`` divides by the sum of the weights instead, so that in batches of one bag
    the weight would cancel.

    Args:
        logits: ``(B, C)``.
        label: ``(B,)``.
        weight: ``(C,)`` or ``None``.

    Returns:
        A scalar.

    Raises:
        ValueError: if a label has no logit.
    """
    if int(label.max()) >= logits.shape[-1]:
        raise ValueError(f"the model gives {logits.shape[-1]} logits and a bag is of class {int(label.max())}")
    losses = F.cross_entropy(logits, label, reduction="none")
    return losses.mean() if weight is None else (losses * weight[label]).mean()


__all__ = ["bag_loss", "balanced_weights", "resolve_weights"]
