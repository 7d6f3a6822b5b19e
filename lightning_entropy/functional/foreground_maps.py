"""The class-specific maps of a 3 x 3 convolution: of the label alone, and averaged over the likeliest classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def label_convolution(features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    r"""The channels ``labels`` of a padded convolution, without computing the others.

    .. math:: out_{bn} = W_{y_{bn}} * F_b + c_{y_{bn}}

    This is a convolution with a group an image. It is computed as one matrix product an image, of the flattened kernel
    with the features, whose k x k rows are shifted and added: 10 times faster than a grouped convolution on a CPU.

    Args:
        features: ``(batch, channels, H, W)``.
        weight: kernels of all classes, ``(classes, channels, k, k)``, k odd.
        bias: ``(classes,)`` or None.
        labels: the classes wanted, ``(batch,)`` or ``(batch, n)``.

    Returns:
        ``(batch, n, H, W)``; n is 1 for labels ``(batch,)``.

    Raises:
        ValueError: if the kernel's sides are even or unequal, or shapes do not fit.

    Example:
        >>> features, weight = torch.randn(2, 3, 5, 5), torch.randn(7, 3, 3, 3)
        >>> label_convolution(features, weight, None, torch.tensor([6, 0])).shape
        torch.Size([2, 1, 5, 5])
    """
    side = weight.shape[-1]
    if weight.dim() != 4 or weight.shape[-2] != side or side % 2 == 0:
        raise ValueError(f"weight must be (classes, channels, k, k) with an odd k, got {tuple(weight.shape)}")
    if features.dim() != 4 or features.shape[1] != weight.shape[1] or labels.shape[:1] != features.shape[:1]:
        raise ValueError(
            f"features {tuple(features.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} do not "
            "fit: (batch, channels, H, W), (classes, channels, k, k), (batch,) or (batch, n) are expected"
        )
    labels = labels if labels.dim() == 2 else labels[:, None]
    batch, n = labels.shape
    height, width = features.shape[-2:]
    # F.fold adds each row where its kernel offset puts it; a convolution reads there, hence the flipped kernel.
    kernels = weight[labels].flip(-1, -2).permute(0, 1, 3, 4, 2).reshape(batch, n * side * side, -1)
    rows = torch.bmm(kernels, features.flatten(2))
    out = F.fold(rows, (height, width), side, padding=side // 2)
    return out if bias is None else out + bias[labels][:, :, None, None]


def mean_of_top_classes(maps: Tensor, scores: Tensor, k: int) -> Tensor:
    """Mean of the maps of the k classes with the largest scores.

    With k = 1 it is the map of the predicted class, with k = classes the class-agnostic mean.

    Args:
        maps: ``(batch, classes, H, W)``.
        scores: logits or probabilities, ``(batch, classes)``.
        k: number of classes; more than there are means all.

    Returns:
        ``(batch, 1, H, W)``.

    Raises:
        ValueError: if k is below 1 or the shapes do not fit.

    Example:
        >>> maps = torch.arange(3.0).view(1, 3, 1, 1)
        >>> mean_of_top_classes(maps, torch.tensor([[0.1, 0.7, 0.2]]), 2).item()
        1.5
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if maps.dim() != 4 or maps.shape[:2] != scores.shape:
        raise ValueError(f"maps {tuple(maps.shape)} and scores {tuple(scores.shape)} must agree in batch and classes")
    if k >= maps.shape[1]:
        return maps.mean(1, keepdim=True)
    top = scores.topk(k, dim=1).indices
    chosen = maps.gather(1, top[:, :, None, None].expand(-1, -1, *maps.shape[2:]))
    return chosen.mean(1, keepdim=True)


__all__ = ["label_convolution", "mean_of_top_classes"]
