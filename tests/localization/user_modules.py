"""Image classifiers of users who know nothing of this package, and their batches."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tests.user_modules import SmallNet


class ImageClassifier(LightningModule):
    """Images in, a cross-entropy out."""

    def __init__(self, dropout: float = 0.1, lr: float = 0.01, norm: str = "group") -> None:
        super().__init__()
        self.lr = lr
        self.pool = SmallNet(dropout, norm=norm)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.pool(batch["features"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, eps=1e-4)


def pictures(count: int = 8, batch_size: int = 2, dtype: torch.dtype = torch.float32, side: int = 12) -> list[dict]:
    """Batches of noise with a bright square whose channel is the class."""
    generator = torch.Generator().manual_seed(7)
    out = []
    for _ in range(count):
        label = torch.randint(0, 3, (batch_size,), generator=generator)
        images = 0.3 * torch.randn(batch_size, 3, side, side, generator=generator, dtype=dtype)
        for image, channel in zip(images, label):
            top, left = torch.randint(0, side - 5, (2,), generator=generator).tolist()
            image[channel, top : top + 5, left : left + 5] += 2.0
        out.append({"features": images, "label": label})
    return out
