r"""The generator of BAS: a 3 x 3 convolution and a sigmoid give one foreground map a class.

.. math:: M = \sigma(W * F + c)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.arguments import check_types
from lightning_entropy.functional.foreground_maps import label_convolution, mean_of_top_classes


class ForegroundGenerator(nn.Module):
    r"""Foreground maps from the features of a classifier.

    Args:
        channels: of the features.
        classes: number of maps.
        bias: whether the convolution has one; the paper's segmentation has none.
        seed: of the initial weights (Xavier uniform, bias 0), which do not depend on torch's global random state.

    Raises:
        ValueError: if a number is below 1.

    Reference:
        arXiv 2112.00580.

    Example:
        >>> generator = ForegroundGenerator(16, classes=5)
        >>> features = torch.randn(2, 16, 7, 7)
        >>> generator(features).shape, generator.label_maps(features, torch.tensor([4, 0])).shape
        (torch.Size([2, 5, 7, 7]), torch.Size([2, 1, 7, 7]))
    """

    def __init__(self, channels: int, classes: int, *, bias: bool = True, seed: int = 0) -> None:
        check_types(ForegroundGenerator, locals())
        super().__init__()
        for name, value in (("channels", channels), ("classes", classes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.channels, self.classes = channels, classes
        self.weight = nn.Parameter(torch.empty(classes, channels, 3, 3, device="cpu", dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(classes, device="cpu", dtype=torch.float32)) if bias else None
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int = 0) -> None:
        """Draw the initial weights."""
        generator = torch.Generator(self.weight.device).manual_seed(seed)
        nn.init.xavier_uniform_(self.weight, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """The maps of all classes.

        Args:
            features: ``(batch, channels, H, W)``.

        Returns:
            ``(batch, classes, H, W)``, in (0, 1).
        """
        return torch.sigmoid(F.conv2d(features, self.weight, self.bias, padding=1))

    def label_maps(self, features: Tensor, labels: Tensor) -> Tensor:
        """The maps of the labels alone; its cost does not depend on the number of classes.

        Args:
            features: ``(batch, channels, H, W)``.
            labels: ``(batch,)`` or ``(batch, n)``.

        Returns:
            ``(batch, n, H, W)``; n is 1 for labels ``(batch,)``.
        """
        return torch.sigmoid(label_convolution(features, self.weight, self.bias, labels))

    def top_map(self, features: Tensor, scores: Tensor, k: int = 1) -> Tensor:
        """The mean of the maps of the k classes with the largest scores.

        Args:
            features: ``(batch, channels, H, W)``.
            scores: logits, ``(batch, classes)``.
            k: 1 is the map of the predicted class; the number of classes (or more) the class-agnostic mean.

        Returns:
            ``(batch, 1, H, W)``.
        """
        if k < self.classes:
            return self.label_maps(features, scores.topk(k, dim=1).indices).mean(1, keepdim=True)
        return mean_of_top_classes(self(features), scores, k)

    def extra_repr(self) -> str:
        """Channels and classes."""
        return f"{self.channels}, classes={self.classes}, bias={self.bias is not None}"


__all__ = ["ForegroundGenerator"]
