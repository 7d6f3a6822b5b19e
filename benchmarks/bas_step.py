"""What BAS costs: one training step of a ResNet-50 with and without the callback.

Two Trainers take turns, a block of steps each, in one process; the ratio is taken block by block, so a machine whose
speed drifts does not favour either. On a CPU the seconds are those of the process, which other load does not lengthen.
With ``--strides paper`` it is the paper's network: stride 1 in the last two stages, a map of 28 x 28 at the split, a
pool behind it, and a classifier of three convolutions.

    python benchmarks/bas_step.py [--strides stock] [--batch 8] [--classes 200] [--blocks 6] [--device cpu]
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet50

from lightning_entropy import BackgroundActivationSuppression, set_verbosity

LIMIT = {"stock": 1.25, "paper": 1.5}


class Step(LightningModule):
    """A LightningModule that knows nothing of BAS."""

    def __init__(self, classes: int, strides: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = resnet50(weights=None, num_classes=classes)
        if strides == "paper":
            for stage in (self.net.layer3, self.net.layer4):
                for layer in (stage[0].conv2, stage[0].downsample[0]):
                    layer.stride = (1, 1)
            self.net.layer4 = nn.Sequential(nn.MaxPool2d(2), self.net.layer4)
            self.net.avgpool = nn.Sequential(
                nn.Conv2d(2048, 1024, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(1024, 1024, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(1024, classes, 1),
                nn.AdaptiveAvgPool2d(1),
            )
            self.net.fc = nn.Identity()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


class Clock(Callback):
    """Seconds of each training step, from its batch to its end."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self.device = device

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_train_batch_start(self, *args: object) -> None:
        self.start = self.now()

    def on_train_batch_end(self, *args: object) -> None:
        self.seconds.append(self.now() - self.start)


def block(options: argparse.Namespace, batch: tuple[Tensor, Tensor], bas: bool) -> float:
    """Seconds of a step, the median of one short fit, its first left out."""
    clock = Clock(options.device)
    method = BackgroundActivationSuppression("net.layer4", beta=1.2, input_shape=[3, 64, 64])
    trainer = Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision=options.precision,
        callbacks=[clock, method] if bas else [clock],  # the clock starts before the method and ends after it
        max_steps=options.steps + 1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader([batch] * (options.steps + 1), batch_size=None)
    trainer.fit(Step(options.classes, options.strides), batches)
    return statistics.median(clock.seconds[1:])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):10.4f} {min(values):10.4f} {max(values):10.4f}"


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strides", choices=["stock", "paper"], default="stock")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=6, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a block")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args(arguments)


def measured(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step, plain and with BAS, and their ratios, pair by pair."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    set_verbosity("warning")

    labels = torch.arange(options.batch) % options.classes
    batch = torch.randn(options.batch, 3, options.size, options.size), labels
    block(options, batch, True)  # warm-up
    times: dict[str, list[float]] = {"plain": [], "bas": [], "ratio": []}
    for i in range(options.blocks):
        seconds = {bas: block(options, batch, bas) for bas in ([False, True] if i % 2 == 0 else [True, False])}
        times["plain"].append(seconds[False])
        times["bas"].append(seconds[True])
        times["ratio"].append(seconds[True] / seconds[False])
    return times


def table_rows(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of ``python -m benchmarks``."""
    rows = []
    for strides in ("stock", "paper"):
        small = ["--batch=2", "--size=64", "--classes=10", "--blocks=2", "--steps=1"]
        options = options_of([f"--strides={strides}", *(small if quick else [])])
        medians = {way: statistics.median(values) for way, values in measured(options).items()}
        what = f"ResNet-50, {strides} strides, {options.batch} images of {options.size}"
        rows.append(
            {
                "method": "BAS",
                "quantity": f"training step, {what}",
                "unit": "s",
                "ours": medians["bas"],
                "peer_name": "plain step",
                "peer": medians["plain"],
                "ratio": medians["ratio"],
                "target": LIMIT[strides],
            }
        )
    return rows


def main() -> None:
    options = options_of()
    times = measured(options)
    plain, with_bas, ratios = times["plain"], times["bas"], times["ratio"]

    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.precision}")
    print(
        f"ResNet-50, {options.strides} strides, {options.batch} images of {options.size} x {options.size}, "
        f"{options.classes} classes, {options.blocks} pairs of blocks"
    )
    print(f"{'':24s} {'median':>10s} {'min':>10s} {'max':>10s}")
    print(f"{'step, plain (s)':24s} {spread(plain)}")
    print(f"{'step, BAS (s)':24s} {spread(with_bas)}")
    print(f"{'ratio, pair by pair':24s} {spread(ratios)}")
    limit = LIMIT[options.strides]
    median = statistics.median(ratios)
    print(f"BAS takes {median:.3f} of the plain step (limit {limit}): {'within' if median <= limit else 'ABOVE'}")


if __name__ == "__main__":
    main()
