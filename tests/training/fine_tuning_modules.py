"""A user's module to fine-tune, its data, and a method that looks at the data to choose."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_entropy.surgery.select_modules import select_modules
from lightning_entropy.surgery.selection import Selection
from lightning_entropy.training.before_fit import training_batches, training_loss
from lightning_entropy.training.fine_tuning import FineTuningCallback


class Network(nn.Module):
    """A pretrained network: the same weights whenever it is built."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(6, 16)
            self.norm = nn.BatchNorm1d(16)
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
            self.wide = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x + self.wide(x)


class Classifier(LightningModule):
    """A fresh head on it; dropout for the random state, a metric, a log."""

    def __init__(self, seed: int = 0, lr: float = 0.01, dropout: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.network = Network(seed)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, 2)
        self.accuracy = MulticlassAccuracy(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.network(x)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        return nn.functional.cross_entropy(logits, batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def data(shuffle: bool = False, count: int = 32) -> DataLoader:
    """Eight batches of four."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4, shuffle=shuffle, num_workers=0)


class LargestGradients(FineTuningCallback):
    """A method that needs a diagnosis on the training data."""

    def __init__(self, budget: int = 2, *, selection: str | Path | None = None, **options) -> None:
        super().__init__(selection=selection, **options)
        self.budget = budget
        self.chosen_times = 0

    def choose(self, trainer, module, *, exclude: list[str]) -> Selection:
        self.chosen_times += 1
        with training_batches(trainer, module, 3) as batches:
            loss = lambda _, batch: training_loss(module, batch)  # noqa: E731
            return select_modules(
                module, by="gradient_norm", budget=self.budget, exclude=exclude, data=batches, loss=loss
            )
