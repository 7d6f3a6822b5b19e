"""What AttentionEntropyMonitor costs: training of a timm ViT with and without it, at its default settings.

Two Trainers take turns, a block of steps each, in one process. Times are from the start of one batch to the start of
the next (on a CPU processor time, since other processes disturb it less than the wall clock), so that reading, logging
and the CSV file are all in them. A block has one reading, as ``every_n_steps`` says, and that one is a first reading,
which watches the whole model. Then the cost of a reading alone, from a run in which every second step is one.

    python benchmarks/entropy_monitor_overhead.py [--model vit_tiny_patch16_224] [--batch 8] [--blocks 4] [--device cpu]
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_entropy import AttentionEntropyMonitor, set_verbosity


class Classifier(LightningModule):
    """A LightningModule that knows nothing of the monitor."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import timm

        torch.manual_seed(0)
        self.net = timm.create_model(name, num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(Callback):
    """Seconds from the start of each batch to the start of the next."""

    def __init__(self, device: str) -> None:
        self.starts: list[float] = []
        self.device = device

    def on_train_batch_start(self, *args: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter() if self.device == "cuda" else time.process_time())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.starts, self.starts[1:])]


def block(options: argparse.Namespace, batch: list[Tensor], monitor: Callback | None, steps: int) -> list[float]:
    """Seconds of each step of one fit."""
    clock = Clock(options.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if options.device == "cuda" else "cpu",
            devices=1,
            callbacks=[clock, *([] if monitor is None else [monitor])],
            max_steps=steps + 1,
            max_epochs=-1,
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(options.model), DataLoader([batch] * (steps + 1), batch_size=None))
    return clock.seconds


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):10.4f} {min(values):10.4f} {max(values):10.4f}"


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=4, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=50, help="steps of a block, one of them read")
    parser.add_argument("--readings", type=int, default=10, help="readings in the run that reads every second step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args(arguments)


def images(options: argparse.Namespace) -> list[Tensor]:
    return [torch.randn(options.batch, 3, options.size, options.size), torch.arange(options.batch) % 10]


def measured(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step, plain and monitored, and their ratios, pair by pair."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    set_verbosity("warning")

    batch = images(options)
    block(options, batch, AttentionEntropyMonitor(), 2)  # warm-up
    times: dict[str, list[float]] = {"plain": [], "watched": [], "ratio": []}
    for i in range(options.blocks):
        totals = {}
        for on in (False, True) if i % 2 == 0 else (True, False):
            monitor = AttentionEntropyMonitor(every_n_steps=options.steps, log_figures=False) if on else None
            totals[on] = sum(block(options, batch, monitor, options.steps)) / options.steps
        times["plain"].append(totals[False])
        times["watched"].append(totals[True])
        times["ratio"].append(totals[True] / totals[False])
    return times


def table_rows(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of ``python -m benchmarks``."""
    options = options_of(["--batch=2", "--blocks=2", "--steps=10"] if quick else [])
    medians = {way: statistics.median(values) for way, values in measured(options).items()}
    return [
        {
            "method": "AttentionEntropyMonitor",
            "quantity": f"training step, {options.model}, {options.size} pixels, one reading in {options.steps} steps",
            "unit": "s",
            "ours": medians["watched"],
            "peer_name": "plain step",
            "peer": medians["plain"],
            "ratio": medians["ratio"],
            "target": 1.02,
        }
    ]


def main() -> None:
    options = options_of()
    times = measured(options)
    plain, watched, ratios = times["plain"], times["watched"], times["ratio"]
    batch = images(options)

    extras = {}
    for title, arguments in (("64 rows", {}), ("every row", {"queries": None}), ("64 rows, probe", {"probe": "train"})):
        monitor = AttentionEntropyMonitor(every_n_steps=2, patience=10**6, log_figures=False, **arguments)
        seconds = block(options, batch, monitor, 2 * options.readings + 4)[4:]
        # live it reads batches 0, 2, ...; the probe runs after the second update, in batches 1, 3, ...
        odd = "probe" in arguments
        with_reading, without = seconds[int(odd) :: 2], seconds[int(not odd) :: 2]
        pairs = [a - b for a, b in zip(with_reading, without)]
        extras[title] = (statistics.median(pairs), statistics.median(without))

    start = time.perf_counter()
    monitor.plot()
    figure = time.perf_counter() - start

    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    shape = f"batch {options.batch}, {options.size} pixels"
    print(f"{options.model}, {shape}, {options.blocks} pairs of {options.steps} steps")
    print(f"{'':26s} {'median':>10s} {'min':>10s} {'max':>10s}")
    print(f"{'step, plain (s)':26s} {spread(plain)}")
    print(f"{'step, monitored (s)':26s} {spread(watched)}")
    print(f"{'ratio, pair by pair':26s} {spread(ratios)}")
    for title, (extra, step) in extras.items():
        print(
            f"one reading, {title:16s} {1000 * extra:7.1f} ms, {100 * extra / step:5.1f} % of a step, "
            f"{100 * extra / step / options.steps:5.2f} % at every {options.steps} steps"
        )
    print(f"drawing the figure         {figure:7.2f} s, at most once an epoch and only when a fourth more was read")
    print(f"time overhead {100 * (statistics.median(ratios) - 1):+.2f} % (limit 2 %)")


if __name__ == "__main__":
    main()
