"""The maps of a classifier by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_entropy.localization import (
    BackgroundActivationSuppression,
    centre_gaussian,
    class_maps,
    resize_maps,
    whole_image,
)
from lightning_entropy.surgery.split_backbone import SplitBackbone

LEARNED = ("cam", "grad_cam", "layer_cam", "bas")  # of a class
LAYERED = ("grad_cam", "layer_cam")  # at any layer
_PRIORS = {"centre_gaussian": centre_gaussian, "whole_image": whole_image}
FIXED = tuple(_PRIORS)  # of no model at all


class MapKind(NamedTuple):
    """What a name of a map asks for.

    Attributes:
        method: ``"cam"``, ``"grad_cam"``, ``"layer_cam"``, ``"bas"``, ``"centre_gaussian"`` or ``"whole_image"``.
        top_k: mean over the k likeliest classes, 0 for all; None for the map of one class, the label's where it is
            known.
        layer: of the gradient methods, the module whose output is taken; None for the last map before the pool.
    """

    method: str
    top_k: int | None
    layer: str | None = None


def map_kind(name: str) -> MapKind:
    """Read the name of a map: ``"cam"``, ``"cam_mean"`` (over all classes), ``"bas_top5"``, ``"centre_gaussian"``,
    ``"layer_cam@layer3"`` (at the output of a module) ...

    Raises:
        ValueError: if there is none of that name.

    Example:
        >>> map_kind("bas_top5"), map_kind("cam_mean").top_k
        (MapKind(method='bas', top_k=5, layer=None), 0)
    """
    found = re.fullmatch(rf"({'|'.join(LEARNED)})(?:_(mean|top([1-9][0-9]*)))?(?:@(.+))?", name)
    if found is not None and (found[4] is None or found[1] in LAYERED):
        return MapKind(found[1], None if found[2] is None else int(found[3] or 0), found[4])
    if name in FIXED:
        return MapKind(name, None)
    raise ValueError(
        f"maps: there is no map {name!r}; there are {', '.join((*LEARNED, *FIXED))}, and of the first {len(LEARNED)} "
        f"NAME_mean, over all classes, and NAME_top5, over the 5 likeliest ones; of {', '.join(LAYERED)} NAME@LAYER, "
        "at the output of a module"
    )


@torch.no_grad()
def named_maps(
    names: Sequence[str],
    images: Tensor,
    labels: Tensor | None,
    *,
    model: nn.Module,
    classes: int,
    halves: Callable[[], SplitBackbone],
    suppression: BackgroundActivationSuppression | None,
) -> dict[str, Tensor]:
    """Maps of images, at their size.

    Args:
        names: which maps.
        images: ``(B, C, H, W)``.
        labels: the classes whose maps are wanted, ``(B,)`` or ``(B, n)``; None: the predicted ones.
        model: the classifier.
        classes: how many it tells apart.
        halves: gives the split classifier, asked for where a map needs it.
        suppression: the callback that has the maps of BAS, or None.

    Returns:
        name -> ``(B, 1, H, W)`` float32; ``(B, n, H, W)`` for labels ``(B, n)``.

    Raises:
        ValueError: if a map of BAS is wanted without the callback.
    """
    height, width = int(images.shape[2]), int(images.shape[3])
    found = {}
    for name in names:
        method, top_k, layer = map_kind(name)
        wanted = labels if top_k is None else None
        k = 1 if top_k is None else top_k or classes
        if method in _PRIORS:
            found[name] = _PRIORS[method](height, width).to(images.device).expand(len(images), 1, height, width)
            continue
        if method == "bas":
            if suppression is None:
                raise ValueError(f"map {name!r} needs BackgroundActivationSuppression among the Trainer's callbacks")
            maps, _ = suppression.foreground_maps(images, labels=wanted, top_k=k)
        else:
            at: dict[str, Any] = {"layer": layer} if layer else {"split": halves()}
            maps = class_maps(model, images, wanted, method=method, top_k=k, **at)
        found[name] = resize_maps(maps.float(), (height, width))
    return found


__all__ = ["FIXED", "LEARNED", "MapKind", "map_kind", "named_maps"]
