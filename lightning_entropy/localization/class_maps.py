r"""Class activation maps of a trained classifier: CAM, Grad-CAM and LayerCAM, without editing it.

With the activations :math:`A` of a layer, the logit :math:`s_y` of a class and :math:`g = \partial s_y / \partial A`:

===========  ===========================================================================================
CAM          :math:`\sum_k w_{yk} A_k + b_y`, the classifier at every position; its mean is :math:`s_y`
Grad-CAM     :math:`ReLU(\sum_k \overline{g_k} A_k)`
LayerCAM     :math:`ReLU(\sum_k ReLU(g_k) A_k)`, the weight of a channel being another one at each position
===========  ===========================================================================================

A gradient is taken with respect to a copy of the activations, so none reaches the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.functional.foreground_maps import mean_of_top_classes
from lightning_entropy.localization.split_forward import check_images, split_forward
from lightning_entropy.surgery.coarse_trace import eagerly
from lightning_entropy.surgery.map_layout import MapLayout, layout_of
from lightning_entropy.surgery.split_backbone import SplitBackbone
from lightning_entropy.surgery.split_check import logits_of
from lightning_entropy.training.probe import undisturbed

METHODS = ("cam", "cam_mean", "grad_cam", "layer_cam")


def class_maps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    method: str = "cam",
    split: str | SplitBackbone | None = None,
    layer: str | None = None,
    classifier: str | None = None,
    top_k: int = 1,
) -> Tensor:
    """Where a classifier sees a class.

    The model runs once in evaluation mode; afterwards its modes, gradients, buffers and the random state are as
    before, and it holds no hook. It works inside ``torch.no_grad`` and ``torch.inference_mode``.

    Args:
        model: a classifier, or a module that holds one (a LightningModule).
        images: what it takes, ``(B, channels, height, width)``.
        labels: the classes wanted, ``(B,)`` or several for each image ``(B, n)``; None: the likeliest.
        method: ``"cam"``; ``"cam_mean"``, the mean of the class maps of all classes, which says nothing of a class;
            ``"grad_cam"``; ``"layer_cam"``.
        split: a module at whose input the classifier can be split, or what
            :func:`lightning_entropy.surgery.split_classifier` made, which saves splitting anew in each call. Needed for
            CAM. The gradient methods take the last map before the pool, where Grad-CAM is CAM without its bias, over
            the number of positions, and with negatives cut off.
        layer: for the gradient methods the module whose output is taken, instead of ``split``; any classifier will do.
        classifier: dotted name of the linear layer that gives the logits; None: the last one that runs.
        top_k: without labels, the mean of the maps of this many likeliest classes.

    Returns:
        ``(B, 1, h, w)``, or ``(B, n, h, w)`` for labels ``(B, n)``, float32, at the resolution of the layer. CAM and
        its mean have negative values; the two others have none.

    Raises:
        ValueError: if the method is unknown, names or shapes do not fit, or the classifier cannot be split.

    Reference:
        arXiv 1512.04150 (CAM); arXiv 1610.02391 (Grad-CAM); LayerCAM: Exploring Hierarchical Class Activation Maps for
        Localization, IEEE TIP 2021.

    Example:
        >>> from torchvision.models import resnet18
        >>> net, images = resnet18(num_classes=5), torch.randn(2, 3, 64, 64)
        >>> class_maps(net, images, torch.tensor([0, 3]), split="layer4").shape
        torch.Size([2, 1, 2, 2])
        >>> class_maps(net, images, method="layer_cam", layer="layer3").shape
        torch.Size([2, 1, 4, 4])
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    check_images(images)
    if labels is not None and (labels.dim() not in (1, 2) or len(labels) != len(images)):
        raise ValueError(f"labels must be ({len(images)},) or ({len(images)}, n), got {tuple(labels.shape)}")
    if method.startswith("cam"):
        if split is None:
            raise ValueError(f"method={method!r} needs split=, the module at whose input the classifier is split")
        seen = split_forward(model, images, split, classifier=classifier)
        with torch.no_grad(), seen.seen.precision():
            maps = seen.backbone.class_map(seen.last_map, frozen=True).float()
        if method == "cam_mean":
            return maps.mean(1, keepdim=True)
        if labels is None:
            return mean_of_top_classes(maps, seen.logits, top_k)
        chosen = _checked(labels, maps.shape[1])
        return maps.gather(1, chosen[:, :, None, None].expand(-1, -1, *maps.shape[2:]))
    if (split is None) == (layer is None):
        raise ValueError(f"method={method!r} needs either layer=, the module whose output is taken, or split=")
    # A forward under inference mode leaves tensors without gradient; copies made outside of it have one.
    with torch.inference_mode(False), torch.enable_grad():
        if split is not None:
            activations, logits = _at_last_map(model, images, split, classifier)
        else:
            assert layer is not None
            activations, logits = _at_layer(model, images.clone(), layer)
        wanted = logits.detach().topk(min(top_k, logits.shape[1]), 1).indices if labels is None else labels.clone()
        layout = layout_of(activations, aspect=images.shape[2] / images.shape[3])
        if layout is None:
            raise ValueError(f"the layer's output {tuple(activations.shape)} is no map of several positions")
        maps = _gradient_maps(activations, logits, _checked(wanted, logits.shape[1]), method, layout)
    return maps if labels is not None else maps.mean(1, keepdim=True)


def _gradient_maps(activations: Tensor, logits: Tensor, labels: Tensor, method: str, layout: MapLayout) -> Tensor:
    maps = []
    for label in labels.unbind(1):
        score = logits.gather(1, label[:, None]).sum()  # in evaluation mode no image depends on another one
        (gradient,) = torch.autograd.grad(score, activations, retain_graph=True)
        a, g = layout.to_map(activations.detach()).float(), layout.to_map(gradient).float()
        weight = g.mean((2, 3), keepdim=True) if method == "grad_cam" else g.relu()
        maps.append((weight * a).sum(1).relu())
    return torch.stack(maps, 1)


def _at_last_map(
    model: nn.Module, images: Tensor, split: str | SplitBackbone, classifier: str | None
) -> tuple[Tensor, Tensor]:
    seen = split_forward(model, images.clone(), split, classifier=classifier)
    activations = seen.last_map.detach().clone().requires_grad_()
    with seen.seen.precision():
        return activations, seen.backbone.logits(activations, frozen=True)


def _at_layer(model: nn.Module, images: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """A layer's output as a leaf of the graph, and the logits that follow from it."""
    try:
        module = model.get_submodule(layer)
    except AttributeError as error:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"layer={layer!r} names no module of {type(model).__name__}. Modules: {children}.") from error
    leaves: list[Tensor] = []

    def take(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(f"layer={layer!r} must give one tensor, got {type(output).__name__}")
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # what follows may change it in place

    def run() -> Any:
        with torch.enable_grad():
            return getattr(model, "_orig_mod", model)(images)

    handle = module.register_forward_hook(take)
    try:
        with undisturbed(model):
            logits = logits_of(eagerly(run))
    finally:
        handle.remove()
    if len(leaves) != 1:
        raise ValueError(f"layer={layer!r} ran {len(leaves)} times in one forward, and must run once")
    if logits is None or logits.dim() != 2:
        got = "no tensor" if logits is None else tuple(logits.shape)
        raise ValueError(f"{type(model).__name__} must return logits (batch, classes), got {got}")
    return leaves[0], logits


def _checked(labels: Tensor, classes: int) -> Tensor:
    labels = (labels if labels.dim() == 2 else labels[:, None]).long()
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    return labels


__all__ = ["METHODS", "class_maps"]
