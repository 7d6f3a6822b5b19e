"""Image classifiers of users who know nothing of this package, and their batches."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Three stages and a linear layer behind an average pool; group norm, so that a batch can be divided."""

    def __init__(self, dropout: float, classes: int = 3, norm: str = "group") -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            layer = nn.GroupNorm(2, outputs) if norm == "group" else nn.BatchNorm2d(outputs)
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), layer, nn.ReLU())

        self.stage1, self.stage2, self.stage3 = stage(3, 4, 2), stage(4, 8, 1), stage(8, 12, 2)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(12, classes)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            x = x * mask[:, None]
        x = self.stage3(self.stage2(self.drop(self.stage1(x))))
        return self.fc(x.mean((2, 3)))


class ImageClassifier(LightningModule):
    """Images in, a cross-entropy out."""

    def __init__(self, dropout: float = 0.1, lr: float = 0.01, norm: str = "group") -> None:
        super().__init__()
        self.lr = lr
        self.pool = SmallNet(dropout, norm=norm)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.pool(batch["features"], batch["mask"]), batch["label"])

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
        mask = torch.ones(batch_size, side, side, dtype=torch.bool)
        out.append({"features": images, "mask": mask, "label": label})
    return out
