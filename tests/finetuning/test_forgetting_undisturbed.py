"""A fit that is watched is the fit that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import DataLoader

from lightning_entropy import ForgettingMonitor
from tests.finetuning.forgetting_cases import Classifier, NewTask, Points, fit, old_loader, trainer
from tests.suite.running import same, weights


class Modes(Callback):
    def __init__(self) -> None:
        self.seen: list = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        modes = tuple(m.training for m in pl_module.modules())
        gradients = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]
        self.seen.append((modes, torch.get_rng_state(), gradients))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"val_check_interval": 0.4}])
def test_the_run_is_bitwise_the_run_without_it(tmp_path: Path, options: dict) -> None:
    data = NewTask(jitter=True)
    plain_modes, modes = Modes(), Modes()
    plain, plain_run = fit(tmp_path, plain_modes, data=data, **options)
    old = {
        "jittered": DataLoader(Points(22, 2, jitter=True), batch_size=8, shuffle=True),
        "new task's own": data.val_dataloader(),
    }
    monitor = ForgettingMonitor(old, metric="accuracy", every_n_steps=1)
    module, run = fit(tmp_path, monitor, modes, data=data, **options)
    assert same(weights(module), weights(plain))
    assert {k: float(v) for k, v in run.callback_metrics.items() if "forgetting" not in k} == {
        k: float(v) for k, v in plain_run.callback_metrics.items()
    }
    for mine, theirs in zip(modes.seen, plain_modes.seen, strict=True):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1])
        assert all(map(torch.equal, mine[2], theirs[2]))
    jittered = [r["old"]["jittered"]["loss"] for r in monitor.history]
    assert len(jittered) > 4


@pytest.mark.parametrize("workers", [0, 2])
def test_the_old_loader_may_be_the_training_loader(tmp_path: Path, workers: int) -> None:
    def shared() -> DataLoader:
        return DataLoader(
            Points(40, 1),
            batch_size=8,
            shuffle=True,
            generator=torch.Generator().manual_seed(1),
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context="fork" if workers else None,
        )

    results = []
    for watch in (False, True):
        loader = shared()
        seed_everything(3, verbose=False)
        module = Classifier()
        monitors = [ForgettingMonitor(loader, metric="accuracy", every_n_steps=2)] if watch else []
        trainer(tmp_path, *monitors, limit_val_batches=0).fit(module, loader)
        results.append(weights(module))
    assert same(*results)


def test_evaluations_draw_the_same(tmp_path: Path) -> None:
    loader = DataLoader(Points(22, 2, jitter=True), batch_size=8, shuffle=True)

    class Still(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return 0 * super().training_step(batch, batch_idx)

    module = Still()
    module.net[1].momentum = 0.0
    monitor = ForgettingMonitor(loader, metric="accuracy", limit_batches=1)
    fit(tmp_path, monitor, module=module)
    losses = {r["old"]["old"]["loss"] for r in monitor.history}
    assert len(losses) == 1


def test_after_an_exception_all_is_as_before(tmp_path: Path) -> None:
    calls = []

    def step(module: Classifier, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("planted")
        return module(batch[0])

    seed_everything(3, verbose=False)
    module = Classifier()
    monitor = ForgettingMonitor(old_loader(), metric="accuracy", step=step, every_n_steps=2)
    states = []

    class Record(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            states.append([m.training for m in module.modules()])

    with pytest.raises(RuntimeError, match="planted"):
        fit(tmp_path, Record(), monitor, module=module)
    assert [m.training for m in module.modules()][2:] == states[0][2:]
    assert json.loads(monitor.path.read_text())["readings"][0]["step"] == 0
    fit(tmp_path, monitor)
    assert [r["step"] for r in monitor.history] == [0, 2, 4, 5, 6, 8, 10]


def test_validation_buffers_of_inference_mode_do_no_harm(tmp_path: Path) -> None:
    class Caching(Classifier):
        def on_validation_start(self) -> None:
            self.register_buffer("cache", torch.zeros(3), persistent=False)

    monitor = ForgettingMonitor(old_loader(), metric="accuracy", every_n_steps=3)
    fit(tmp_path, monitor, module=Caching())
    assert len(monitor.history) > 3
