"""What the classifiers of images share: a network that is built when the sizes of the images are known."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_entropy.recipes.classifier import Classifier


class ImageClassifier(Classifier):
    """A :class:`Classifier` whose ``net``, None until it is built, takes images to logits."""

    net: nn.Module | None

    def forward(self, image: Tensor) -> Tensor:
        """Classify images.

        Args:
            image: ``(B, C, H, W)``, as the data give them.

        Returns:
            Logits ``(B, classes)``.

        Raises:
            RuntimeError: if the model is not built yet.
        """
        if self.net is None:
            raise RuntimeError(
                "the model is built by a Trainer, or at once if image_size, in_channels and num_classes are given"
            )
        logits: Tensor = self.net(image)
        return logits

    def logits(self, batch: Any) -> Tensor:
        """Logits ``(B, classes)`` of a batch with ``image``."""
        logits: Tensor = self(batch["image"])
        return logits


__all__ = ["ImageClassifier"]
