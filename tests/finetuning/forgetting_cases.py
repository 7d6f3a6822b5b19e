"""Modules and data of users who have an old task and a new one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Points(Dataset):
    """Points whose class is where they lie; each draw from it is jittered by every random state there is."""

    def __init__(self, count: int, seed: int, *, jitter: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 4, generator=generator)
        self.y = (self.x[:, seed % 4] > 0).long()
        self.jitter = jitter

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + numpy.random.rand() + float(torch.rand(())) if self.jitter else 0.0  # noqa: NPY002
        return self.x[index] + 0.1 * noise, self.y[index]


class Classifier(LightningModule):
    """Batch norm, dropout, plain logits, tuple batches, validation."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(4)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.frozen(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.frozen.eval()  # as some do in the middle of training
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("val_accuracy", (logits.argmax(-1) == batch[1]).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class NewTask(LightningDataModule):
    """Training and validation of the new task, and a hook for the old one."""

    def __init__(self, *, jitter: bool = False) -> None:
        super().__init__()
        self.jitter = jitter
        self.asked = 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Points(40, 1, jitter=self.jitter), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Points(24, 5), batch_size=8)

    def old_task_dataloaders(self) -> dict[str, DataLoader]:
        self.asked += 1
        return {"circles": old_loader(), "lines": old_loader(seed=3, count=10)}


def old_loader(count: int = 22, seed: int = 2, batch_size: int = 8, **options) -> DataLoader:
    """Old-task data whose last batch is smaller than the others."""
    return DataLoader(Points(count, seed), batch_size=batch_size, **options)


class Language(LightningModule):
    """A language model of transformers by its configuration, with random weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> object:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def token_batches(count: int = 3, *, vocabulary: int = 40, labels: bool = True) -> list[dict[str, Tensor]]:
    """Padded token batches, each with another number of tokens."""
    generator = torch.Generator().manual_seed(5)
    out = []
    for i in range(count):
        ids = torch.randint(1, vocabulary, (2, 6 + 4 * i), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 3 + i :] = 0
        batch = {"input_ids": ids * mask, "attention_mask": mask}
        if labels:
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        out.append(batch)
    return out


def as_loader(batches: list) -> DataLoader:
    """Batches as they are."""
    return DataLoader(batches, batch_size=None)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        **{**defaults, **quiet, **options},
    )


def fit(
    folder: Path, *callbacks: Callback, module: Any = None, data: Any = None, ckpt_path: Any = None, **options: Any
):
    seed_everything(3, verbose=False)
    module = Classifier() if module is None else module
    run = trainer(folder, *callbacks, **options)
    run.fit(module, datamodule=NewTask() if data is None else data, ckpt_path=ckpt_path)
    return module, run


def evaluated(module: LightningModule, loader: DataLoader) -> tuple[float, float]:
    """Loss and accuracy over all items at once."""
    module.eval()
    x, y = (torch.stack([item[i] for item in loader.dataset]) for i in range(2))
    with torch.no_grad():
        logits = module(x)
    return float(F.cross_entropy(logits, y)), float((logits.argmax(-1) == y).double().mean())
