"""What CRReLU costs beside the activation that it replaces: forward, backward and bytes kept, in one run.

Every row takes turns in one process, in an order that is drawn anew each round, so that a machine whose speed drifts
favours none. A round runs forward and backward of each. Printed are the smallest and the median time, and their
ratio to nn.GELU: the smallest is the figure to compare on a machine that others use too. With one thread the time is
the process's own (what others use is not counted), with more, or on a GPU, it is the wall's.

    python benchmarks/activations.py [--rounds 200] [--threads 1] [--shape 4 197 3072] [--device cpu] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_entropy.activation import CRReLU
from lightning_entropy.functional import crrelu

TARGETS = {
    ("float32", "CRReLU"): 1.02,
    ("bfloat16", "CRReLU"): 0.75,
    ("float32", "CRReLU, no compiler"): 1.70,
}


def written_out(x: Tensor, eps: Tensor) -> Tensor:
    """The formula as one writes it down."""
    return torch.relu(x) + eps * x * torch.exp(-x.pow(2) / 2)


def rows(device: str) -> dict[str, Callable[[], nn.Module]]:
    """What is compared; a module is made anew for each dtype."""

    class Formula(CRReLU):
        def forward(self, x: Tensor) -> Tensor:
            return written_out(x, self.eps)

    class Chunked(CRReLU):
        def forward(self, x: Tensor) -> Tensor:
            return crrelu(x, self.eps, backend="chunked" if device == "cpu" else "formula")

    def compiled(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: torch.compile(make(), fullgraph=True, dynamic=False)

    return {
        "nn.GELU": nn.GELU,
        "nn.ReLU": nn.ReLU,
        "CRReLU": CRReLU,
        "CRReLU, no compiler": Chunked,
        "formula": Formula,
        "nn.GELU, torch.compile": compiled(nn.GELU),
        "CRReLU, torch.compile": compiled(CRReLU),
        "formula, torch.compile": compiled(Formula),
    }


class Clock:
    """Seconds: the process's own on one thread of a CPU, the wall's otherwise."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.read = time.process_time if device == "cpu" and threads == 1 else time.perf_counter

    def __call__(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.read()


def bytes_kept(act: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct tensors that a forward keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        act(x)
    return sum(kept.values())


def measure(dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, object]]:
    """One table: all rows in one dtype."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.shape, generator=generator).to(options.device, dtype).requires_grad_()
    grad = torch.randn(options.shape, generator=generator).to(options.device, dtype)
    acts = {name: make().to(options.device, dtype) for name, make in rows(options.device).items()}
    inputs = {name: [x, *act.parameters()] for name, act in acts.items()}
    clock = Clock(options.device, options.threads)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in acts}
    for name, act in acts.items():  # compiles
        torch.autograd.grad(act(x), inputs[name], grad)
    order = list(acts)
    for round_ in range(options.rounds + 3):
        random.Random(round_).shuffle(order)
        for name in order:
            start = clock()
            y = acts[name](x)
            middle = clock()
            torch.autograd.grad(y, inputs[name], grad)
            end = clock()
            if round_ >= 3:
                times[name].append((1e3 * (middle - start), 1e3 * (end - middle)))
            del y
    best = {name: sum(map(min, zip(*t))) for name, t in times.items()}
    middle_of = {name: statistics.median(map(sum, t)) for name, t in times.items()}
    gelu = bytes_kept(acts["nn.GELU"], x)
    return [
        {
            "dtype": str(dtype)[6:],
            "activation": name,
            "forward_ms": min(f for f, _ in times[name]),
            "backward_ms": min(b for _, b in times[name]),
            "median_ms": middle_of[name],
            "to_gelu": best[name] / best["nn.GELU"],
            "median_to_gelu": middle_of[name] / middle_of["nn.GELU"],
            "bytes_to_gelu": bytes_kept(act, x) / gelu,
        }
        for name, act in acts.items()
    ]


def show(table: list[dict[str, object]]) -> None:
    head = f"{'':24s} {'forward':>9s} {'backward':>9s} {'median':>9s} {'/ GELU':>8s} {'median':>8s} {'bytes':>8s}"
    print(f"\n{table[0]['dtype']}\n{head}  target")
    for row in table:
        target = TARGETS.get((str(row["dtype"]), str(row["activation"])))
        mark = "" if target is None else f"  <= {target:.2f} {'met' if row['to_gelu'] <= target else 'NOT met'}"  # type: ignore[operator]
        print(
            f"{row['activation']:24s} {row['forward_ms']:9.3f} {row['backward_ms']:9.3f} {row['median_ms']:9.3f} "
            f"{row['to_gelu']:8.2f} {row['median_to_gelu']:8.2f} {row['bytes_to_gelu']:8.4f}{mark}"
        )


def table_rows(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of ``python -m benchmarks``."""
    options = options_of(["--rounds=3", "--shape", "2", "16", "64"] if quick else [])
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        table: list[dict[str, Any]] = measure(dtype, options)
        of = f"{tuple(options.shape)}, {str(dtype)[6:]}"
        gelu = next(r for r in table if r["activation"] == "nn.GELU")
        for one in table:
            if "GELU" in one["activation"]:
                continue
            both = {"method": one["activation"], "peer_name": "nn.GELU"}
            times = {"ours": one["forward_ms"] + one["backward_ms"], "peer": gelu["forward_ms"] + gelu["backward_ms"]}
            target = TARGETS.get((str(dtype)[6:], one["activation"]))
            smallest = {"quantity": f"forward and backward (smallest), {of}", "unit": "ms", **times}
            found.append({**both, **smallest, "ratio": one["to_gelu"], "target": target})
            kept = {"quantity": f"bytes kept for backward, {of}", "unit": "of GELU", "ours": one["bytes_to_gelu"]}
            found.append({**both, **kept, "peer": 1.0, "ratio": one["bytes_to_gelu"], "target": None})
    return found


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--shape", type=int, nargs="+", default=[4, 197, 3072], help="default: ViT-B, 4 images")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        TARGETS.clear()
        TARGETS.update({(dtype, "CRReLU"): 1.00 for dtype in ("float32", "bfloat16")})
        where = torch.cuda.get_device_name()
    else:
        cores = f"{options.threads} of {os.cpu_count()} cores"
        where = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {cores}"
    before = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    tables = [measure(dtype, options) for dtype in (torch.float32, torch.bfloat16)]
    after = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{where}, torch {torch.__version__}, load {before:.1f} to {after:.1f}")
    print(
        f"shape {tuple(options.shape)}, {options.rounds} rounds; ms; smallest times, their sum / GELU's; bytes / GELU's"
    )
    for table in tables:
        show(table)
    if options.json:
        options.json.write_text(json.dumps([row for table in tables for row in table], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
