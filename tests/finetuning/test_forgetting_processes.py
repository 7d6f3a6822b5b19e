"""Two gloo processes with unlike batches give the values of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchmetrics.classification import MulticlassAUROC

from lightning_entropy import ForgettingMonitor
from tests.finetuning.forgetting_cases import Classifier, Points, old_loader
from tests.suite.running import same, weights


class Own(IterableDataset):
    """Each process reads other items, and another number of them."""

    def __iter__(self):
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        points = Points(22, 2)
        yield from (points[i] for i in range(22) if (i < 5) == (rank == 0) or world == 1)


class Watched(Classifier):
    """Embeddings of pairs, and loaders that deal out by themselves to the process that asks."""

    def pairs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        noise = torch.stack([batch[1], 1 - batch[1]] * 2, -1).to(batch[0].dtype)
        return self.net[0](batch[0]), self.net[0](batch[0] + noise)

    def old_task_dataloaders(self) -> dict[str, DataLoader]:
        points = Points(22, 2)
        dealt = DataLoader(points, batch_size=3, sampler=DistributedSampler(points, shuffle=False))
        return {"dealt": dealt, "streamed": DataLoader(Own(), batch_size=4)}


def fit(folder: Path, monitors: list[ForgettingMonitor], module: Classifier, processes: int) -> list[dict[str, Any]]:
    """The readings that each monitor has written."""
    seed_everything(3, verbose=False)
    several: dict[str, Any] = {"strategy": DDPStrategy(start_method="spawn", process_group_backend="gloo")}
    run = Trainer(
        accelerator="cpu",
        devices=processes,
        max_epochs=1,
        limit_train_batches=3,
        callbacks=list(monitors),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(several if processes > 1 else {}),
    )
    run.fit(module, DataLoader(Points(40, 1), batch_size=4), DataLoader(Points(24, 5), batch_size=8))
    return [json.loads(path.read_text())["readings"] for path in sorted(folder.glob("forgetting_*.json"))]


def monitors() -> list[ForgettingMonitor]:
    return [
        ForgettingMonitor(old_loader(), metric="accuracy", every_n_steps=1),
        ForgettingMonitor(old_loader(), metric="perplexity"),
        ForgettingMonitor(old_loader(), metric="retrieval", step="pairs"),
        ForgettingMonitor(old_loader(), metric=MulticlassAUROC(2)),
        ForgettingMonitor(old_loader(batch_size=6), metric="accuracy", limit_batches=3, step="forward_of"),
    ]


class Limited(Watched):
    def forward_of(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self(batch[0])


def old(readings: list[dict[str, Any]], index: int, task: str = "old") -> dict[str, float]:
    return {k: v for k, v in readings[index]["old"][task].items() if k != "increase"}


@pytest.mark.slow
def test_two_processes_give_the_values_of_one_and_train_as_without(tmp_path: Path) -> None:
    plain, watched = Limited(), Limited()
    watched.load_state_dict(plain.state_dict())
    fit(tmp_path, [], plain, 2)
    dealing = ForgettingMonitor(metric="accuracy")
    two = fit(tmp_path / "two", [*monitors(), dealing], watched, 2)
    assert same(weights(plain), weights(watched))
    assert [[r["step"] for r in readings] for readings in two] == [[0, 1, 2, 3], *[[0, 3]] * 5]
    # One process, before its own training, evaluates the weights of the two processes' training.
    alone = Limited()
    alone.load_state_dict(weights(watched))
    one = fit(tmp_path / "one", monitors(), alone, 1)
    for several, single in zip(two[:5], one, strict=True):
        assert old(several, -1) == old(single, 0)
    whole = old(one[0], 0)
    assert "val_loss" not in two[0][1]["new"]
    assert "val_loss" in two[0][-1]["new"]
    for task in ("dealt", "streamed"):
        found = old(two[5], -1, task)
        assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert found["accuracy"] == pytest.approx(whole["accuracy"])
