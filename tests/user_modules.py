"""LightningModules of users who know nothing of this package, and their batches."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader


class BagPool(nn.Module):
    """A user's attention pooling that knows nothing of this package."""

    def __init__(self, width: int, branches: int = 1) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, branches))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.score(x).masked_fill(~mask[..., None], -torch.inf)
        return (torch.softmax(scores, dim=1).transpose(1, 2) @ x).mean(1)


class BagClassifier(LightningModule):
    """A user's LightningModule: bags in, a cross-entropy out, dropout for the random state."""

    def __init__(self, width: int = 6, dropout: float = 0.1, lr: float = 0.1) -> None:
        super().__init__()
        self.width, self.lr = width, lr
        self.drop = nn.Dropout(dropout)
        self.pool = BagPool(width)
        self.head = nn.Linear(width, 2)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        z = self.pool(self.drop(batch["features"]), batch["mask"])
        return nn.functional.cross_entropy(self.head(z), batch["label"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class MeanClassifier(BagClassifier):
    """The same without attention: nothing for a method on attention to attach to."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Identity()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.head(batch["features"].mean(1)), batch["label"])


def bags(count: int = 8, batch_size: int = 2, width: int = 6, dtype: torch.dtype = torch.float32) -> list[dict]:
    """Padded batches of bags with unlike sizes."""
    generator = torch.Generator().manual_seed(7)
    out = []
    for i in range(count):
        features = torch.randn(batch_size, 9, width, generator=generator, dtype=dtype)
        sizes = torch.tensor([9 - (i + j) % 5 for j in range(batch_size)])
        mask = torch.arange(9) < sizes[:, None]
        label = torch.randint(0, 2, (batch_size,), generator=generator)
        out.append({"features": features * mask[..., None], "mask": mask, "label": label})
    return out


class TokenEncoder(nn.Module):
    """Two encoder layers and an attention pooling."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(width, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True) for _ in range(2)
        )
        self.bag = BagPool(16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        return self.bag(x, mask)


class TokenClassifier(LightningModule):
    """Sequences in, a cross-entropy out, and an old task that it should remember.

    The optimizer's epsilon is large, since key biases have a gradient of rounding errors that Adam would blow up.
    """

    def __init__(self, width: int = 6, dropout: float = 0.1, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self.pool = TokenEncoder(width, dropout)
        self.head = nn.Linear(16, 2)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.pool(batch["features"], batch["mask"])), batch["label"])

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.pool(features, mask))

    def old_task_dataloaders(self) -> DataLoader:
        return DataLoader(bags(count=3, dtype=self.head.weight.dtype), batch_size=None)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, eps=1e-4)


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

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.drop(self.stage1(x))))
        return self.fc(x.mean((2, 3)))


class PicturedTokens(TokenClassifier):
    """A picture beside each sequence, with a classifier of its own: what every method can attach to."""

    def __init__(self, width: int = 6, dropout: float = 0.1, lr: float = 0.01) -> None:
        super().__init__(width, dropout, lr)
        self.picture = SmallNet(dropout, classes=2)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(batch) + nn.functional.cross_entropy(self.picture(batch["picture"]), batch["label"])


def pictured_bags(**options: Any) -> list[dict]:
    """Padded batches of bags, and for each bag a picture of noise with a bright square whose channel is the class."""
    generator = torch.Generator().manual_seed(8)
    out = bags(**options)
    for batch in out:
        count = len(batch["label"])
        pictures = 0.3 * torch.randn(count, 3, 12, 12, generator=generator, dtype=batch["features"].dtype)
        for picture, channel in zip(pictures, batch["label"]):
            top, left = torch.randint(0, 7, (2,), generator=generator).tolist()
            picture[channel, top : top + 5, left : left + 5] += 2.0
        batch["picture"] = pictures
    return out
