r"""Where a classifier's evidence lies, before anything is trained on it: a mask grows and the activation is watched.

BAS takes the features away outside and inside of a mask, and takes what the class's activation says about that for the
extent of the object. Whether it is, can be seen with masks that are known:

    S_fg = logit of y of tail(F * m),   S_bg = logit of y of tail(F * (1 - m)),   S = logit of y of tail(F)

while m grows from the middle of the object to its edge and on to the whole image. Evidence on the object: at the edge
S_bg / S is small. A shortcut through the background: S_bg / S hardly falls where the object is taken away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.functional.growing_masks import growth_order, order_of
from lightning_entropy.functional.prior_maps import centre_gaussian
from lightning_entropy.localization.evidence import EvidenceCurve
from lightning_entropy.localization.image_labels import check_range, find_images, find_labels
from lightning_entropy.localization.split_forward import SplitForward, split_forward
from lightning_entropy.surgery.split_backbone import SplitBackbone
from lightning_entropy.training.lightning import submodule
from lightning_entropy.training.probe import undisturbed

SOURCES = ("masks", "boxes", "cam", "centre")


def evidence_curve(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    split: str | SplitBackbone,
    masks: str | None = None,
    classifier: str | None = None,
    target: str | int | None = None,
    steps: int = 10,
    max_images: int = 256,
    correct_only: bool = True,
) -> EvidenceCurve:
    r"""Foreground activation, background activation and cross-entropy while a mask grows.

    Masks are of the positions of the features at the split. With known objects the mask grows in order of depth: from
    0 (nothing) over 1 (the object) to 2 (everything). Activations are sums over images,
    :math:`\sum S_{fg} / \sum S`, over those whose S is positive.

    Args:
        model: a trained classifier, or a module that holds one; unchanged.
        batches: of a loader; in each the images, their labels, and what ``masks`` asks for.
        split: see :class:`lightning_entropy.BackgroundActivationSuppression`.
        masks: ``"masks"``, entry ``mask`` ``(B, H, W)``, 1 (or any class) on the object, 255 unknown and left out;
            ``"boxes"``, entry ``boxes``, for each image ``(n, 4)`` pixels, taken to be filled; ``"cam"``, grown by the
            label's class map; ``"centre"``, grown from the middle of the image. None: the first of the first three
            that the batch has. Neither of the last two knows the object.
        classifier: dotted name of the linear layer that gives the logits; None: the last one that runs.
        target: key or index of the labels in the batch; None finds them.
        steps: number of steps up to the edge of the object, and again up to the whole image.
        max_images: stop after this many.
        correct_only: leave out images that the classifier gets wrong.

    Returns:
        The curve; ``.verdict`` is what it says.

    Raises:
        ValueError: if an argument is out of range, a batch lacks something, or no image is left.

    Reference:
        Figures 2 and 3 of arXiv 2112.00580, and the limits seen in docs/methods/class_maps.md.

    Example:
        >>> layers = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> net = nn.Sequential(*layers).requires_grad_(False)
        >>> for weight in net.parameters():
        ...     _ = weight.fill_(0.1)
        >>> batch = {"image": torch.rand(8, 3, 8, 8), "label": torch.arange(8) % 2, "mask": torch.zeros(8, 8, 8)}
        >>> batch["mask"][:, 2:5, 2:5] = 1
        >>> evidence_curve(net, [batch], split="1", steps=4, correct_only=False).growth
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    """
    if masks is not None and masks not in SOURCES:
        raise ValueError(f"masks must be one of {', '.join(SOURCES)} or None, got {masks!r}")
    for name, value in (("steps", steps), ("max_images", max_images)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    like = next(model.parameters(), None)
    growth = torch.arange(2 * steps + 1, dtype=torch.float64) / steps
    sums = torch.zeros(6, len(growth), dtype=torch.float64)
    objects, used, seen, without, wrong, dead = 0.0, 0, 0, 0, 0, 0
    for batch in batches:
        if seen >= max_images:
            break
        if like is not None:
            batch = submodule("utilities").move_data_to_device(batch, like.device)
        masks = masks or next((s for s in SOURCES[:2] if _entry(batch, s) is not None), "cam")
        images = find_images(batch)
        run = split_forward(model, images, split, classifier=classifier)
        split = run.backbone
        labels = find_labels(batch, len(images), split.classes, target=target)
        check_range(labels, split.classes)
        known, order, inside = _orders(run, labels, batch, masks, tuple(images.shape[2:]))
        overall = run.logits.gather(1, labels[:, None])[:, 0]
        right = run.logits.argmax(1) == labels if correct_only else torch.ones_like(known)
        chosen = (known & right & (overall > 0)).nonzero().flatten()[: max_images - seen]
        seen += len(chosen)
        without += int((~known).sum())
        wrong += int((known & ~right).sum())
        dead += int((known & right & (overall <= 0)).sum())
        if not len(chosen):
            continue
        used += len(chosen)
        objects += float(inside[chosen].double().sum()) / order[0].numel()
        sums += _watched(run, labels, order, inside, growth, chosen)
    left_out = {"without an object": without, "classified wrongly": wrong, "activation not positive": dead}
    if not used:
        reasons = ", ".join(f"{n} {why}" for why, n in left_out.items() if n) or "the loader gave none"
        raise ValueError(f"no image is left for the curve: {reasons}. Train the classifier first, or pass other images")
    assert masks is not None
    area, foreground, background, ce, background_ce, still_right = (sums / used).tolist()
    overall_mean = foreground[-1]  # the last mask is everything
    return EvidenceCurve(
        masks=masks,
        growth=(growth if masks in SOURCES[:2] else growth / 2).tolist(),
        areas=area,
        foreground=[value / overall_mean for value in foreground],
        background=[value / overall_mean for value in background],
        cross_entropy=ce,
        background_cross_entropy=background_ce,
        background_accuracy=still_right,
        object_area=objects / used if masks in SOURCES[:2] else None,
        images=used,
        left_out=left_out,
    )


def _watched(
    run: SplitForward, labels: Tensor, order: Tensor, inside: Tensor, growth: Tensor, chosen: Tensor
) -> Tensor:
    """Sums over images of area, S_fg, S_bg, both cross-entropies and of right answers without the mask, a step each."""
    backbone, features = run.backbone, run.seen.features[chosen]
    maps = backbone.layout.to_map(features)
    order, inside, labels = order[chosen], inside[chosen], labels[chosen]
    total = order[0].numel()
    rows = []

    def logits(mask: Tensor) -> Tensor:
        masked = backbone.layout.from_map(maps * mask.to(maps.dtype), features)
        last_map = backbone.last_map(masked, frozen=True, batch_norm="eval")
        return backbone.logits(last_map, frozen=True).double()

    with undisturbed(backbone.model), run.seen.precision():
        for u in growth.tolist():
            count = (min(u, 1.0) * inside + max(u - 1.0, 0.0) * (total - inside)).round()
            mask = (order < count[:, None, None])[:, None]
            fore, back = logits(mask), logits(~mask)
            rows.append(
                [
                    mask.double().mean((1, 2, 3)).sum(),
                    fore.gather(1, labels[:, None]).sum(),
                    back.gather(1, labels[:, None]).sum(),
                    F.cross_entropy(fore, labels, reduction="sum"),
                    F.cross_entropy(back, labels, reduction="sum"),
                    (back.argmax(1) == labels).double().sum(),
                ]
            )
    return torch.stack([torch.stack(row) for row in rows], 1).cpu()


def _orders(
    run: SplitForward, labels: Tensor, batch: Any, source: str, image_size: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Which images have an object, the order in which positions join, and how many of them lie on the object."""
    maps = run.backbone.layout.to_map(run.seen.features)
    count, height, width = len(maps), maps.shape[2], maps.shape[3]
    everywhere = torch.full((count,), height * width / 2, device=maps.device)  # growth 1 is half of the positions
    known = torch.ones(count, dtype=torch.bool, device=maps.device)
    if source == "centre":
        return known, order_of(centre_gaussian(height, width)).to(maps.device).expand(count, -1, -1), everywhere
    if source == "cam":
        with torch.no_grad(), run.seen.precision():
            class_map = run.backbone.class_map(run.last_map, frozen=True).float()
        own = class_map[torch.arange(count), labels][:, None]
        return known, order_of(F.interpolate(own, (height, width), mode="bilinear"))[:, 0], everywhere
    entry = _entry(batch, source)
    if entry is None:
        raise ValueError(
            f"masks={source!r}: the batch has no entry {'mask' if source == 'masks' else 'boxes'!r} (a dictionary); "
            "pass masks='cam' or 'centre' where the object is not known"
        )
    pixels = _object(entry, source, image_size).to(maps.device)
    if len(pixels) != count:
        raise ValueError(f"masks={source!r}: {len(pixels)} of them for {count} images")
    known = pixels.flatten(1).any(1)
    cover = F.adaptive_avg_pool2d(pixels[:, None].float(), (height, width))[:, 0]
    # An object smaller than half a position has the position that it covers most.
    objects = (cover >= 0.5) | (cover == cover.amax((1, 2), keepdim=True))
    orders = [growth_order(one) for one in objects]
    return known, torch.stack(orders), objects.sum((1, 2))


def _object(entry: Any, source: str, image_size: tuple[int, ...]) -> Tensor:
    """Masks ``(B, H, W)`` bool of the objects, in pixels of the image."""
    if source == "masks":
        masks = entry[:, 0] if entry.dim() == 4 else entry
        return (masks > 0) & (masks != 255)
    height, width = image_size
    masks = torch.zeros(len(entry), height, width, dtype=torch.bool)
    for mask, boxes in zip(masks, entry):
        for x0, y0, x1, y1 in boxes.reshape(-1, 4).round().long().clamp(min=0).tolist():
            mask[y0:y1, x0:x1] = True
    return masks


def _entry(batch: Any, source: str) -> Any:
    """What a batch has under the name of a source."""
    return batch.get("mask" if source == "masks" else source) if isinstance(batch, Mapping) else None


__all__ = ["SOURCES", "evidence_curve"]
