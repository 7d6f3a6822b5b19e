"""What BAS computes in one step from what the user's forward left at the split."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_entropy.functional.bas import area_constraint, background_activation_ratio, pool_foreground
from lightning_entropy.localization.foreground_generator import ForegroundGenerator
from lightning_entropy.surgery.split_backbone import SplitBackbone
from lightning_entropy.surgery.split_reader import SplitPass


def bas_parts(
    backbone: SplitBackbone,
    generator: ForegroundGenerator,
    seen: SplitPass,
    last_map: Tensor,
    labels: Tensor,
    known: Tensor | None = None,
    *,
    variant: str = "extension",
    bn_mode: str = "batch",
    guide_classifier: bool = True,
) -> dict[str, Tensor]:
    """The parts of the loss of BAS beside the classification, each with its own gradient routes.

    The ratio reaches the generator, and the head through the generator's input; the area the same; the guidance also
    the tail and the classifier, unless ``guide_classifier`` is False.

    Args:
        backbone: the split classifier.
        generator: of foreground maps from the features at the split.
        seen: what the plain forward left there.
        last_map: of the plain forward, with its graph.
        labels: one class an image, ``(batch,)``.
        known: which images take part, ``(batch,)``; None: all.
        variant: see :func:`lightning_entropy.functional.background_activation_ratio`.
        bn_mode: see :func:`lightning_entropy.surgery.frozen_call.frozen_call`.
        guide_classifier: whether the guidance trains the classifier too.

    Returns:
        ``ratio``, ``guidance``, ``area``, and without gradient ``exceeding_fraction`` and ``dead_fraction``; means over
        the images that take part.
    """
    index = labels[:, None]
    with seen.precision():
        features = backbone.layout.to_map(seen.features)
        foreground = generator.label_maps(features, labels)
        masked = backbone.layout.from_map(features.detach() * (1 - foreground), seen.features.detach())
        background_map = backbone.last_map(masked, frozen=True, batch_norm=bn_mode)
        background = backbone.logits(background_map, frozen=True).gather(1, index)[:, 0]
        overall = backbone.logits(last_map.detach(), frozen=True).gather(1, index)[:, 0]
        inside = pool_foreground(foreground, (last_map.shape[-2], last_map.shape[-1]))
        guided_map = last_map if guide_classifier else last_map.detach()
        guided = backbone.logits(guided_map, inside, frozen=not guide_classifier)
    ratio = background_activation_ratio(overall, background, variant=variant)
    guided = guided.float() if guided.dtype in (torch.float16, torch.bfloat16) else guided
    guidance = F.cross_entropy(guided, labels, reduction="none")
    exceeding, dead = (background > overall).to(ratio.dtype), (overall <= 0).to(ratio.dtype)
    if known is not None:
        ratio, guidance, foreground, exceeding, dead = (
            part[known] for part in (ratio, guidance, foreground, exceeding, dead)
        )
    return {
        "ratio": _mean(ratio),
        "guidance": _mean(guidance),
        "area": area_constraint(foreground) if len(foreground) else foreground.sum(),
        "exceeding_fraction": _mean(exceeding).detach(),
        "dead_fraction": _mean(dead).detach(),
    }


def _mean(values: Tensor) -> Tensor:
    """The mean; of no images 0, with a gradient of 0."""
    return values.mean() if len(values) else values.sum()


__all__ = ["bas_parts"]
