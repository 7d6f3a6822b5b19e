"""Batches and quiet Trainers for the tests of the recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.data import Batch
from lightning_entropy.training.lightning import Trainer


def make_batch(sizes: list[int], *, features: int = 6, classes: int = 2, coords: bool = False, seed: int = 0) -> Batch:
    """A padded batch whose padding is large, so that any use of it shows."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(sizes)
    values = torch.randn(len(sizes), longest, features, generator=generator)
    mask = torch.arange(longest)[None, :] < torch.tensor(sizes)[:, None]
    values[~mask] = 50.0
    label = torch.arange(len(sizes)) % classes
    keys = (torch.rand(len(sizes), longest, generator=generator) < 0.3) & mask
    batch = Batch(features=values, mask=mask, label=label, slide=[f"s{i}" for i in range(len(sizes))])
    batch["instance_labels"] = keys.float()
    if coords:
        side = 4
        place = torch.arange(longest)
        grid = torch.stack((place % side, place // side), dim=-1) * 256
        batch["coords"] = grid.expand(len(sizes), -1, -1).clone()
    return batch


def one_bag(batch: Batch, index: int) -> Batch:
    """A bag of a batch without its padding."""
    exists = batch["mask"][index]
    found: dict[str, Any] = {"label": batch["label"][index : index + 1], "slide": [batch["slide"][index]]}
    for name in ("features", "mask", "coords", "instance_labels"):
        if name in batch:
            value: Tensor = batch[name]  # type: ignore[literal-required]
            found[name] = value[index : index + 1, exists]
    return found  # type: ignore[return-value]


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    """A Trainer on the CPU that prints and logs nothing."""
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **options})
