from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lightning_entropy import ForgettingMonitor
from tests.finetuning.forgetting_cases import (
    Classifier,
    Language,
    NewTask,
    Points,
    as_loader,
    evaluated,
    fit,
    old_loader,
    token_batches,
    trainer,
)
from tests.suite.running import same, weights


def test_values_are_those_over_all_items(tmp_path: Path) -> None:
    loader = old_loader()
    seed_everything(3, verbose=False)
    before = evaluated(Classifier(), loader)
    monitor = ForgettingMonitor(loader, metric="accuracy")
    module, run = fit(tmp_path, monitor)
    after = evaluated(module, loader)
    first, last = monitor.history[0], monitor.history[-1]
    assert [(r["step"], r["epoch"], r["when"]) for r in monitor.history] == [
        (0, 0, "before"),
        (5, 0, "validation"),
        (10, 1, "validation"),
    ]
    assert first["old"]["old"]["loss"] == pytest.approx(before[0], rel=1e-6)
    assert first["old"]["old"]["accuracy"] == pytest.approx(before[1])
    assert last["old"]["old"]["loss"] == pytest.approx(after[0], rel=1e-6)
    assert last["old"]["old"]["accuracy"] == pytest.approx(after[1])
    assert last["old"]["old"]["increase"] == pytest.approx(after[0] - before[0], abs=1e-6)
    assert first["new"] == {}
    new = evaluated(module, NewTask().val_dataloader())
    assert last["new"]["val_accuracy"] == pytest.approx(new[1], rel=1e-6)
    assert float(run.callback_metrics["forgetting/loss"]) == pytest.approx(after[0], rel=1e-6)


def test_a_whole_sanity_check_is_the_score_before_training(tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    loss, accuracy = evaluated(Classifier(), NewTask().val_dataloader())
    monitor = ForgettingMonitor(old_loader(), metric="accuracy")
    fit(tmp_path, monitor, num_sanity_val_steps=-1)
    first = monitor.history[0]["new"]
    assert first["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert first["val_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert json.loads(monitor.path.read_text())["readings"][0]["new"] == first


def test_named_tasks_come_from_the_datamodule(tmp_path: Path) -> None:
    data, monitor = NewTask(), ForgettingMonitor(metric="accuracy")
    module, run = fit(tmp_path, monitor, data=data)
    assert data.asked == 1
    loss, _ = evaluated(module, old_loader(seed=3, count=10))
    assert monitor.history[-1]["old"]["lines"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert {"forgetting/circles/loss", "forgetting/lines/accuracy", "forgetting/lines/increase"} <= {
        *run.callback_metrics
    }


def test_the_module_may_have_the_hook_and_the_step(tmp_path: Path) -> None:
    class Own(Classifier):
        def old_task_dataloaders(self) -> DataLoader:
            return old_loader()

        def old_task_step(self, batch: Any) -> dict[str, torch.Tensor]:
            return {"logits": -self(batch[0]), "labels": batch[1]}

        def doubled(self, batch: Any) -> torch.Tensor:
            return 2 * self(batch[0])

    monitors = [
        ForgettingMonitor(metric="accuracy"),
        ForgettingMonitor(metric="accuracy", step="doubled"),
        ForgettingMonitor(metric="accuracy", step=lambda module, batch: module(batch[0])),
    ]
    data = NewTask()
    del NewTask.old_task_dataloaders
    try:
        fit(tmp_path, *monitors, module=Own(), data=data)
    finally:
        NewTask.old_task_dataloaders = RESTORED
    minus, double, plain = (m.history[0]["old"]["old"] for m in monitors)
    assert minus["accuracy"] == pytest.approx(1 - plain["accuracy"])
    assert double["accuracy"] == plain["accuracy"]
    assert double["loss"] != plain["loss"]
    assert len({m.state_key for m in monitors}) == 3
    assert {p.name for p in tmp_path.glob("*.json")} == {f"forgetting_{i}.json" for i in range(3)}


RESTORED = NewTask.old_task_dataloaders


def test_torchmetrics_and_functions(tmp_path: Path) -> None:
    collection = MetricCollection({"top": MulticlassAccuracy(2, average="micro"), "auc": MulticlassAUROC(2)})

    def margin(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return output[:, 1] - output[:, 0]

    def several(output: torch.Tensor, batch: Any) -> dict[str, Any]:
        return {"mean": output.mean(), "loss": 7.0}

    monitors = [ForgettingMonitor(old_loader(), metric=m) for m in (collection, MulticlassAUROC(2), margin, several)]
    module, _ = fit(tmp_path, *monitors)
    many, one, function, mapping = (m.history[-1]["old"]["old"] for m in monitors)
    loss, accuracy = evaluated(module, old_loader())
    assert many["top"] == pytest.approx(accuracy, rel=1e-6)
    assert many["auc"] == one["multiclassauroc"]
    assert many["loss"] == pytest.approx(loss, rel=1e-6)
    module.eval()
    with torch.no_grad():
        logits = module(old_loader().dataset.x)
    assert function["margin"] == pytest.approx(float((logits[:, 1] - logits[:, 0]).mean()), rel=1e-5)
    assert mapping["mean"] == pytest.approx(float(logits.mean()), rel=1e-5)
    assert mapping["loss"] == 7
    assert not collection["top"].update_called, "the user's metric is not touched"


# When.


@pytest.mark.parametrize(
    ("options", "run", "expected"),
    [
        ({"before": False}, {}, [(5, "validation"), (10, "validation")]),
        ({"every_n_epochs": 2}, {}, [(0, "before"), (10, "validation")]),
        ({}, {"val_check_interval": 0.4}, [(0, "before"), *[(s, "validation") for s in (2, 4, 7, 9)]]),
        ({"before": False}, {"check_val_every_n_epoch": 2}, [(5, "epoch"), (10, "validation")]),
        ({"before": False}, {"limit_val_batches": 0}, [(5, "epoch"), (10, "epoch")]),
        (
            {"every_n_epochs": None, "every_n_steps": 4},
            {"accumulate_grad_batches": 2, "max_epochs": 3},
            [(0, "before"), (4, "step"), (8, "step")],
        ),
        (
            {"every_n_steps": 4},
            {},
            [(0, "before"), (4, "step"), (5, "validation"), (8, "step"), (10, "validation")],
        ),
    ],
)
def test_moments(tmp_path: Path, options: dict, run: dict, expected: list) -> None:
    monitor = ForgettingMonitor(old_loader(), metric="accuracy", **options)
    fit(tmp_path, monitor, **run)
    assert [(r["step"], r["when"]) for r in monitor.history] == expected


def test_the_same_weights_are_evaluated_once(tmp_path: Path) -> None:
    calls = []

    def step(module: Classifier, batch: Any) -> torch.Tensor:
        calls.append(len(batch[0]))
        return module(batch[0])

    monitor = ForgettingMonitor(old_loader(), metric="accuracy", step=step, every_n_steps=5)
    fit(tmp_path, monitor)
    assert calls == [8, 8, 6] * 3
    assert [r["when"] for r in monitor.history] == ["before", "validation", "validation"]
    assert all("val_loss" in r["new"] for r in monitor.history[1:])


def test_limit_batches(tmp_path: Path) -> None:
    sizes = []
    step = lambda module, batch: sizes.append(len(batch[0])) or module(batch[0])  # noqa: E731
    fit(tmp_path, ForgettingMonitor(old_loader(), metric="accuracy", step=step, limit_batches=2), max_epochs=1)
    assert sizes == [8, 8] * 2


def test_callbacks_can_monitor_it(tmp_path: Path) -> None:
    monitor = ForgettingMonitor(old_loader(), metric="accuracy")
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="forgetting/loss", filename="best")
    stop = EarlyStopping(monitor="forgetting/increase", patience=1)
    _, run = fit(tmp_path, stop, monitor, keep, enable_checkpointing=True, max_epochs=6)
    losses = [r["old"]["old"]["loss"] for r in monitor.history[1:]]
    assert float(keep.best_model_score) == pytest.approx(min(losses), rel=1e-6)
    increases = [r["old"]["old"]["increase"] for r in monitor.history[1:]]
    worse = next((i for i in range(1, len(increases)) if increases[i] >= min(increases[:i])), 5)
    assert run.current_epoch == min(worse + 1, 6)


def test_the_file_and_the_figure(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = ForgettingMonitor(old_loader(), metric="accuracy")
    fit(tmp_path, monitor, logger=logger)
    assert monitor.path == Path(logger.log_dir, "forgetting.json")
    stored = json.loads(monitor.path.read_text())
    assert stored["metric"] == "accuracy"
    assert stored["tasks"] == ["old"]
    assert stored["new_task"] == "val_accuracy"
    assert stored["readings"] == monitor.history
    assert len(list(Path(logger.log_dir, "figures", "forgetting", "tradeoff").glob("*.png"))) == 2
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert "forgetting/loss" in rows[0]
    figure = monitor.plot(quantity="accuracy")
    tradeoff, over_steps = figure.axes
    assert tradeoff.get_ylabel() == "new task: val_accuracy"
    assert tradeoff.lines[0].get_xdata().tolist() == [r["old"]["old"]["accuracy"] for r in monitor.history[1:]]
    assert over_steps.lines[0].get_xdata().tolist() == [0, 5, 10]
    with pytest.raises(ValueError, match="nothing was read yet"):
        ForgettingMonitor(old_loader()).plot()


def test_neither_file_nor_figure(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = ForgettingMonitor(old_loader(), metric="accuracy", json=False, log_figures=False)
    fit(tmp_path, monitor, logger=logger)
    assert monitor.path is None
    assert not list(tmp_path.rglob("*.png")) + list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("where", ["validation", "epoch", "middle"])
def test_a_resumed_run_goes_on_with_the_readings(tmp_path: Path, where: str) -> None:
    def keep() -> ModelCheckpoint:
        if where == "middle":
            return ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
        return ModelCheckpoint(
            dirpath=tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=where == "epoch"
        )

    whole = ForgettingMonitor(old_loader(), metric="accuracy", every_n_steps=2)
    options: dict[str, Any] = {"module": Classifier(dropout=0.0), "enable_checkpointing": True, "max_epochs": 3}
    data = NewTask()
    data.train_dataloader = lambda: Steady(Points(40, 1))  # type: ignore[method-assign]
    first, _ = fit(tmp_path, whole, keep(), data=data, **options)
    later = ForgettingMonitor(old_loader(), metric="accuracy", every_n_steps=2)
    path = tmp_path / ("step=3.ckpt" if where == "middle" else "epoch=0.ckpt")
    resumed = resume(tmp_path, [later, keep()], data, path)
    assert same(weights(first), weights(resumed))
    assert [(r["step"], r["old"]) for r in later.history] == [(r["step"], r["old"]) for r in whole.history]
    assert later.path == whole.path
    assert json.loads(later.path.read_text())["readings"] == later.history


class Steady(DataLoader):
    """In order, and goes on within an epoch."""

    def __init__(self, dataset: Points) -> None:
        super().__init__(dataset, batch_size=8)
        self.done = 0

    def __iter__(self):
        start, self.done = self.done % len(self), 0
        for i, batch in enumerate(super().__iter__()):
            if i >= start:
                self.done = i + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def resume(folder: Path, callbacks: list, data: NewTask, path: Path) -> LightningModule:
    seed_everything(3, verbose=False)
    module = Classifier(dropout=0.0)
    run = trainer(folder, *callbacks, max_epochs=3, enable_checkpointing=True)
    run.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return module


def test_a_new_fit_begins_anew_and_leaves_the_old_file(tmp_path: Path) -> None:
    monitor = ForgettingMonitor(old_loader(), metric="accuracy")
    fit(tmp_path, monitor)
    first, kept = monitor.path, monitor.path.read_text()
    fit(tmp_path, monitor, max_epochs=1)
    assert monitor.path == tmp_path / "forgetting-1.json"
    assert first.read_text() == kept
    assert len(monitor.history) == 2


def test_it_says_once_what_it_reads(tmp_path: Path, announced: list[str]) -> None:
    fit(tmp_path, ForgettingMonitor(metric="accuracy"))
    (line,) = [line for line in announced if "ForgettingMonitor" in line]
    assert line == (
        "ForgettingMonitor: accuracy of circles (3 batches), lines (2 batches) with Classifier, before training, "
        f"in every validation; {tmp_path}/forgetting.json"
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_a_language_model_of_transformers(tmp_path: Path, precision: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**size, intermediate_size=16, num_key_value_heads=2)
    module = Language(transformers.LlamaForCausalLM(config))
    old = {"told": as_loader(token_batches()), "untold": as_loader(token_batches(labels=False))}
    monitor = ForgettingMonitor(old, metric="perplexity")
    trainer(tmp_path, monitor, max_epochs=1, precision=precision).fit(module, as_loader(token_batches(4)))
    first, last = monitor.history[0]["old"], monitor.history[-1]["old"]
    assert first["told"] == first["untold"]
    assert first["told"]["perplexity"] == pytest.approx(40, rel=0.2), "random weights"
    assert last["told"]["increase"] < 0, "it trains on the same text"
