"""Class maps of trained classifiers, and what the pre-check says of them before BAS is trained.

A small CNN is trained on generated scenes (``embedded:objects``) with and without weaker evidence on the body of the
object (``strength``), and with backgrounds that tell the class (``correlation``). For each it prints the evidence curve
at the edge of the object with its verdict, and the accuracy of boxes and pixels of the maps, at thresholds from the
validation images. Layers: the last map before the pool, and the output of the stage before it.

    python benchmarks/class_maps.py [--epochs 16] [--train 1500] [--seed 0] [--figures FOLDER] [--settings NAME ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_entropy import GTKnownLocalization, MaxBoxAccuracyV2, PixelAveragePrecision
from lightning_entropy.data import LocalizationSet
from lightning_entropy.localization import centre_gaussian, class_maps, evidence_curve, resize_maps, whole_image
from lightning_entropy.recipes.localization_models import SmallCNN
from lightning_entropy.surgery import SplitBackbone, split_classifier
from lightning_entropy.training.figures import write_figure

SETTINGS = {"stripes": (0.6, 0.0), "digit alone": (0.0, 0.0), "stripes, background 0.9": (0.6, 0.9)}
MAPS = (
    "CAM",
    "CAM, mean over classes",
    "Grad-CAM",
    "LayerCAM",
    "LayerCAM, stage before",
    "centre Gaussian",
    "whole image",
)


def train(data: LocalizationSet, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = SmallCNN(3, len(data.classes))
    loader = data.train_dataloader()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for batch in loader:
            loss = nn.functional.cross_entropy(net(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def maps_of(name: str, net: SmallCNN, split: SplitBackbone, images: Tensor, labels: Tensor) -> Tensor:
    side = images.shape[2], images.shape[3]
    if name in ("centre Gaussian", "whole image"):
        one = centre_gaussian(*side) if name.startswith("centre") else whole_image(*side)
        return one.expand(len(images), 1, *side)
    if name == "LayerCAM, stage before":
        maps = class_maps(net, images, labels, method="layer_cam", layer="stages.1")
    else:
        method = {"CAM": "cam", "Grad-CAM": "grad_cam", "LayerCAM": "layer_cam"}.get(name, "cam_mean")
        maps = class_maps(net, images, labels, method=method, split=split)
    return resize_maps(maps, side)


def judge(name: str, net: SmallCNN, split: SplitBackbone, data: LocalizationSet) -> list[float]:
    values: list[float] = []
    thresholds: dict[type, object] = {}
    for loader in (data.val_dataloader(), data.test_dataloader()):
        known = GTKnownLocalization(threshold=thresholds.get(GTKnownLocalization), contours="largest_component")
        v2 = MaxBoxAccuracyV2(threshold=thresholds.get(MaxBoxAccuracyV2))
        pixels = PixelAveragePrecision()
        for batch in loader:
            maps = maps_of(name, net, split, batch["image"], batch["label"])
            for metric in (known, v2):
                metric.update(maps, batch["boxes"])
            pixels.update(maps, batch["mask"])
        if not thresholds:
            thresholds = {type(metric): metric.fit_threshold() for metric in (known, v2)}
            continue
        values = [known.compute()["gt_known"].item(), v2.compute()["box_accuracy_v2"].item()]
        values.append(pixels.compute()["pixel_average_precision"].item())
    return values


def accuracy(net: nn.Module, loader: DataLoader) -> float:
    with torch.no_grad():
        right = [(net(b["image"]).argmax(1) == b["label"]).float() for b in loader]
    return torch.cat(right).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--train", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", type=Path, default=None, help="folder for the curves")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {given.train} images, {given.epochs} epochs, seed {given.seed}", flush=True)
    for title in given.settings:
        strength, correlation = SETTINGS[title]
        data = LocalizationSet(
            strength=strength, background_correlation=correlation, train_count=given.train, seed=given.seed
        )
        data.prepare_data()
        data.setup()
        net = train(data, given.epochs, given.seed)
        split, _ = split_classifier(net, net.split, input_shape=(3, 64, 64))
        print(f"\n{title}: accuracy {accuracy(net, data.test_dataloader()):.3f}")
        curve = evidence_curve(net, data.val_dataloader(), split=split)
        print(curve.verdict, flush=True)
        half, edge = curve.growth.index(0.5), curve.edge
        for name, values in (("S_fg/S", curve.foreground), ("S_bg/S", curve.background), ("CE", curve.cross_entropy)):
            print(f"  {name:7} half of the object {values[half]:.2f}, edge {values[edge]:.2f}, image {values[-1]:.2f}")
        if given.figures:
            write_figure(curve.plot(), given.figures / f"evidence_{title.replace(' ', '_').replace(',', '')}.png")
        for name in MAPS:
            known, v2, pxap = judge(name, net, split, data)
            print(f"| {name} | {known:.3f} | {v2:.3f} | {pxap:.3f} |", flush=True)


if __name__ == "__main__":
    main()
