"""What ForgettingMonitor shows of four ways to train on, and what it costs: the table of its card.

A perceptron learns scikit-learn's digits 0 to 4, then 5 to 9, which is when it is monitored: 1,200 digits to train on
and 597 to test, of both tasks together. The table has the new task's accuracy and the old task's loss at the end, and
the old loss where the new accuracy first reaches a level, as mean and standard deviation over the seeds; or all values,
where not every seed reaches the level. Then processor time of a run with and without the monitor, in turns, on one
thread.

    python benchmarks/forgetting_monitor.py [--seeds 5] [--epochs 15] [--level 0.7] [--pairs 5]
"""

from __future__ import annotations

import argparse
import copy
import logging
import platform
import statistics
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_entropy import ForgettingMonitor, set_verbosity
from lightning_entropy.training.forgetting_history import old_at

ARMS = {
    "all layers, 1e-3": ("all", 1e-3),
    "all layers, 3e-4": ("all", 3e-4),
    "last layer, 3e-3": ("last", 3e-3),
    "last layer, 1e-2": ("last", 1e-2),
}
TRAIN = 1200
READINGS = 3  # in an epoch


class Perceptron(LightningModule):
    """Knows nothing of the monitor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.trained, self.rate = "all", 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        right = (self(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("val_accuracy", right, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = self.net if self.trained == "all" else self.net[-1]
        self.net.requires_grad_(False)
        trained.requires_grad_(True)
        return torch.optim.AdamW(trained.parameters(), lr=self.rate)


def loaders(seed: int, first: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and test digits of the five classes from ``first`` on."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = []
    for part in (order[:TRAIN], order[TRAIN:]):
        x, y = torch.from_numpy(images).float()[part] / 16, torch.from_numpy(labels)[part]
        mine = (y >= first) & (y < first + 5)
        parts.append(TensorDataset(x[mine], y[mine]))
    return DataLoader(parts[0], batch_size=32, shuffle=True), DataLoader(parts[1], batch_size=100)


def trainer(epochs: int, callbacks: list[Any], readings: int) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        val_check_interval=1 / readings,
        num_sanity_val_steps=-1,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def monitored(old: DataLoader[Any]) -> ForgettingMonitor:
    return ForgettingMonitor(old, metric="accuracy", new_task="val_accuracy", log_figures=False, json=False)


def continued(start: Perceptron, arm: str, seed: int, epochs: int, callbacks: list[Any]) -> None:
    seed_everything(seed, verbose=False)
    model = copy.deepcopy(start)
    model.trained, model.rate = ARMS[arm]
    trainer(epochs, callbacks, READINGS).fit(model, *loaders(seed, 5))


def first_task(seed: int, epochs: int) -> tuple[Perceptron, DataLoader[Any]]:
    seed_everything(seed, verbose=False)
    model = Perceptron()
    train, test = loaders(seed, 0)
    trainer(epochs, [], 1).fit(model, train, test)
    return model, test


def mean(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def at_level(values: list[float | None]) -> str:
    reached = [value for value in values if value is not None]
    if len(reached) == len(values):
        return mean(reached, 2)
    listed = ", ".join(f"{value:.2f}" for value in sorted(reached))
    return f"{len(reached)} of {len(values)} seeds reach it" + (f": {listed}" if listed else "")


def tradeoff(options: argparse.Namespace) -> None:
    before: list[float] = []
    rows: dict[str, list[tuple[float, float, float | None]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        start, old = first_task(seed, options.epochs)
        for arm in ARMS:
            monitor = monitored(old)
            continued(start, arm, seed, options.epochs, [monitor])
            first, last = monitor.history[0], monitor.history[-1]
            level = old_at(monitor.history, new_task="val_accuracy", level=options.level, quantity="loss")
            rows[arm].append((last["new"]["val_accuracy"], last["old"]["old"]["loss"], level))
        before.append(first["old"]["old"]["loss"])
    print(f"{options.seeds} seeds, {options.epochs} epochs a task; the old loss is {mean(before, 3)} before\n")
    print(f"| trained | new accuracy, end | old loss, end | old loss where the new one first reaches {options.level} |")
    print("|---|---|---|---|")
    for arm, found in rows.items():
        accuracy, loss, level = (list(column) for column in zip(*found))
        print(f"| {arm} | {mean(accuracy, 3)} | {mean(loss, 2)} | {at_level(level)} |")


def cost(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    start, old = first_task(0, 1)
    times: dict[bool, list[float]] = {False: [], True: []}
    readings = 0
    for _ in range(options.pairs + 1):
        for on in times:
            monitor = monitored(old)
            begin = time.process_time()
            continued(start, "all layers, 1e-3", 0, options.epochs, [monitor] if on else [])
            times[on].append(time.process_time() - begin)
            readings = len(monitor.history) if on else readings
    plain, watched = (times[on][1:] for on in (False, True))  # the first pair warms up
    extra = statistics.median(b - a for a, b in zip(plain, watched))
    items = len(old.dataset)  # type: ignore[arg-type]
    print(
        f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, processor time: "
        f"{readings} readings of {items} items in {len(old)} batches added {extra:.2f} s to a run of "
        f"{statistics.median(plain):.2f} s, {1000 * extra / readings:.1f} ms each (medians of {options.pairs} pairs)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--level", type=float, default=0.7)
    parser.add_argument("--pairs", type=int, default=5, help="runs with and without the monitor; 0 measures no time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    set_verbosity("warning")
    tradeoff(options)
    if options.pairs:
        cost(options)


if __name__ == "__main__":
    main()
