"""What the localization metrics cost against the published evaluator, and that they give the same numbers.

The published evaluator searches every map for contours at each of 1,000 thresholds with OpenCV; that loop is the
baseline, imported from the tests. Both are timed in turn on the same maps, in process time and on one thread. Counts of
located images must be equal at every threshold and overlap.

Four kinds of maps: ``cam``, 14 x 14 random, bicubic (a class activation map of a network of stride 16); ``relu``,
28 x 28 half of it zero, bilinear; ``objects``, two or three Gaussians (a map that is as good as maps get); ``noise``,
each pixel by itself, of which few are timed because the baseline needs seconds for each.

    python benchmarks/wsol_metrics.py [--maps 200] [--size 224] [--backends auto numpy opencv] [--kinds cam relu]
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_entropy.localization import MaxBoxAccuracy, MaxBoxAccuracyV2
from tests.localization.official_evaluator import OpenCVLoop

BATCH = 32


def score_maps(kind: str, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
    if kind == "cam":
        coarse = torch.from_numpy(rng.random((count, 1, 14, 14)))
        return F.interpolate(coarse, size=(size, size), mode="bicubic")[:, 0]
    if kind == "relu":
        coarse = torch.from_numpy(rng.normal(size=(count, 1, 28, 28)).clip(0))
        return F.interpolate(coarse, size=(size, size), mode="bilinear")[:, 0]
    if kind == "noise":
        return torch.from_numpy(rng.random((count, size, size)))
    rows, columns = np.mgrid[:size, :size] / size
    maps = np.zeros((count, size, size))
    for one in maps:
        for _ in range(rng.integers(2, 4)):
            (y, x), (tall, wide) = rng.uniform(0.2, 0.8, 2), rng.uniform(0.07, 0.22, 2)
            one += rng.uniform(0.4, 1) * np.exp(-(((rows - y) / tall) ** 2) - ((columns - x) / wide) ** 2)
    return torch.from_numpy(maps)


def true_boxes(count: int, size: int, rng: np.random.Generator) -> list[torch.Tensor]:
    boxes = []
    for _ in range(count):
        corner = rng.integers(0, size // 2, (rng.integers(1, 3), 2))
        boxes.append(
            torch.from_numpy(np.concatenate((corner, corner + rng.integers(size // 6, size // 2, corner.shape)), 1))
        )
    return boxes


def compare(
    kind: str, count: int, size: int, backends: list[str], numbers: list[dict[str, Any]] | None = None
) -> list[list[str]]:
    rng = np.random.default_rng(0)
    maps, boxes = score_maps(kind, count, size, rng), true_boxes(count, size, rng)
    thresholds = np.arange(0, 1, 0.001)
    rows = []
    for name, make, overlaps in (
        ("MaxBoxAcc", MaxBoxAccuracy, (0.5,)),
        ("MaxBoxAccV2", MaxBoxAccuracyV2, (0.3, 0.5, 0.7)),
    ):
        loop = OpenCVLoop(thresholds, overlaps, multiple=name == "MaxBoxAccV2")
        metrics: dict[str, Any] = {backend: make(backend=backend) for backend in backends}
        spent = dict.fromkeys(["loop", *backends], 0.0)
        for start in range(0, count, BATCH):  # in turn, so that a machine whose speed drifts favours none
            part, truth = maps[start : start + BATCH], boxes[start : start + BATCH]
            begin = time.process_time()
            for one, of in zip(part.numpy(), truth):
                loop.accumulate(one, of.numpy())
            spent["loop"] += time.process_time() - begin
            for backend, metric in metrics.items():
                begin = time.process_time()
                metric.update(part, truth)
                spent[backend] += time.process_time() - begin
        expected = np.stack([loop.correct[overlap] for overlap in overlaps])
        row = [kind, name, str(count), f"{1000 * spent['loop'] / count:.1f}"]
        for backend, metric in metrics.items():
            if not np.array_equal(metric.correct.numpy(), expected):
                raise SystemExit(f"{kind}, {name}, {backend}: counts differ from the loop's")
            row.append(f"{1000 * spent[backend] / count:.1f} ({spent['loop'] / spent[backend]:.1f}x)")
            if numbers is not None:
                numbers.append(
                    {
                        "method": f"{name}, {backend}",
                        "quantity": f"a map of {size} x {size}, {kind}",
                        "unit": "ms",
                        "ours": 1000 * spent[backend] / count,
                        "peer_name": "published evaluator",
                        "peer": 1000 * spent["loop"] / count,
                        "ratio": spent[backend] / spent["loop"],
                        "target": None,
                    }
                )
        rows.append([*row, "equal"])
    return rows


def table_rows(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of ``python -m benchmarks``."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    numbers: list[dict[str, Any]] = []
    for kind in ("cam",) if quick else ("cam", "relu", "objects", "noise"):
        count = 3 if kind == "noise" else 4 if quick else 200
        compare(kind, count, 64 if quick else 224, ["auto"] if quick else ["auto", "numpy", "opencv"], numbers)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=200)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--backends", nargs="+", default=["auto", "numpy", "opencv"])
    parser.add_argument("--kinds", nargs="+", default=["cam", "relu", "objects", "noise"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(
        f"{platform.machine()}, torch {torch.__version__}, NumPy {np.__version__}, OpenCV {cv2.__version__}, one thread"
    )
    head = ["maps", "metric", "number", "loop, ms a map", *arguments.backends, "counts"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for kind in arguments.kinds:
        count = min(arguments.maps, 3) if kind == "noise" else arguments.maps
        for row in compare(kind, count, arguments.size, arguments.backends):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
