"""What AEM costs: one training step of gated ABMIL on a bag of 20,000 x 1,024 with and without the callback.

Time: two Trainers take turns, a block of steps each, in one process; the ratio is taken block by block, so a machine
whose speed drifts does not favour either. Memory: the largest resident set (on a GPU the largest allocation) of a
fresh process that trains one way, the two ways in turn.

    python benchmarks/aem_overhead.py [--instances 20000] [--features 1024] [--blocks 12] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_entropy import AttentionEntropyMaximization, set_verbosity
from lightning_entropy.recipes.abmil import ABMIL


class Step(LightningModule):
    """A LightningModule that knows nothing of AEM."""

    def __init__(self, features: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = ABMIL(features, num_classes=2, hidden=512, gated=True)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["features"], batch["mask"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(Callback):
    """Seconds of each training step, from its batch to its end."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self.device = device

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_start(self, *args: object) -> None:
        self.start = self.now()

    def on_train_batch_end(self, *args: object) -> None:
        self.seconds.append(self.now() - self.start)


def bag(options: argparse.Namespace) -> dict[str, Tensor]:
    features = torch.randn(1, options.instances, options.features)
    mask = torch.ones(1, options.instances, dtype=torch.bool)
    return {"features": features, "mask": mask, "label": torch.tensor([1])}


def block(options: argparse.Namespace, batch: dict[str, Tensor], aem: bool) -> list[float]:
    """Seconds of the steps of one short fit, the first two left out."""
    clock = Clock(options.device)
    # The clock is outermost: it starts before the callback under test and ends after it.
    callbacks: list[Callback] = [clock, *([AttentionEntropyMaximization(0.1)] if aem else [])]
    trainer = Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        callbacks=callbacks,
        max_steps=options.steps + 2,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Step(options.features), DataLoader([batch] * (options.steps + 2), batch_size=None))
    return clock.seconds[2:]


def peak(options: argparse.Namespace) -> float:
    """Peak memory of this process in MB after a block."""
    block(options, bag(options), options.peak == "aem")
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1e3
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark reads peak memory on Linux only")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):10.4f} {min(values):10.4f} {max(values):10.4f}"


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    set_verbosity("warning")


def measured(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and their ratios, pair by pair, and the peak memory of fresh processes."""
    quiet()
    batch = bag(options)
    block(options, batch, True)  # warm-up
    times: dict[str, list[float]] = {"plain": [], "aem": [], "ratio": []}
    for i in range(options.blocks):
        order = [False, True] if i % 2 == 0 else [True, False]
        medians = {aem: statistics.median(block(options, batch, aem)) for aem in order}
        times["plain"].append(medians[False])
        times["aem"].append(medians[True])
        times["ratio"].append(medians[True] / medians[False])

    memory: dict[str, list[float]] = {"plain": [], "aem": []}
    arguments = [f"--{name}={getattr(options, name)}" for name in ("instances", "features", "steps", "device")]
    for _ in range(options.processes):
        for way, values in memory.items():
            out = subprocess.run(
                [sys.executable, __file__, *arguments, "--peak", way], capture_output=True, text=True, check=True
            )
            values.append(json.loads(out.stdout.strip().splitlines()[-1]))
    return times, memory


def table_rows(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of ``python -m benchmarks``."""
    small = ["--instances=2000", "--features=128", "--blocks=2", "--steps=3", "--processes=1"]
    options = options_of(small if quick else [])
    times, memory = measured(options)
    medians = {way: statistics.median(values) for way, values in times.items()}
    peaks = {way: statistics.median(values) for way, values in memory.items()}
    what = f"gated ABMIL, a bag of {options.instances:,} x {options.features:,}"
    step = {"quantity": f"training step, {what}", "unit": "s", "ours": medians["aem"], "peer": medians["plain"]}
    peak_of = {"quantity": f"peak of the process, {what}", "unit": "MB", "ours": peaks["aem"], "peer": peaks["plain"]}
    both = {"method": "AEM", "peer_name": "plain step"}
    return [
        {**both, **step, "ratio": medians["ratio"], "target": 1.02},
        {**both, **peak_of, "ratio": peaks["aem"] / peaks["plain"], "target": 1.01},
    ]


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=1_024)
    parser.add_argument("--blocks", type=int, default=12, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in a block")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes for peak memory, each way")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peak", choices=["plain", "aem"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of()
    if options.peak:
        quiet()
        print(json.dumps(peak(options)))
        return

    times, memory = measured(options)
    plain, with_aem, ratios = times["plain"], times["aem"], times["ratio"]
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"gated ABMIL, one bag of {options.instances:,} x {options.features:,}, {options.blocks} pairs of blocks")
    print(f"{'':24s} {'median':>10s} {'min':>10s} {'max':>10s}")
    print(f"{'step, plain (s)':24s} {spread(plain)}")
    print(f"{'step, AEM (s)':24s} {spread(with_aem)}")
    print(f"{'ratio, pair by pair':24s} {spread(ratios)}")
    print(f"{'peak memory, plain (MB)':24s} {spread(memory['plain'])}")
    print(f"{'peak memory, AEM (MB)':24s} {spread(memory['aem'])}")
    time_cost = 100 * (statistics.median(ratios) - 1)
    memory_cost = 100 * (statistics.median(memory["aem"]) / statistics.median(memory["plain"]) - 1)
    print(f"time overhead {time_cost:+.2f} % (limit 2 %), peak memory {memory_cost:+.2f} % (limit 1 %)")


if __name__ == "__main__":
    main()
