"""Coverage of ``swap_activations`` over real architectures: every activation that runs is swapped or named.

    python benchmarks/swap_coverage.py [--quick] [--only NAME ...] [--output table.md]

Activations are counted by torch's profiler (what the operators of a forward record, scripted and fused code
included), which the swap knows nothing of. With n the operations before, m those that remain after every activation
was exchanged for one that runs none, a row holds

    n = swapped + m   and   m = refused + kept, summed over the records of the report.

``same`` says whether the output is equal to the bit after a swap for the same functions.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.swap_architectures import QUICK, Architecture, architectures
from lightning_entropy.activation.swap import swap_activations
from lightning_entropy.surgery.activation_families import family_of_class, is_gate, known_families
from lightning_entropy.surgery.example_inputs import Example, as_example, example_inputs

ACTIVATIONS = {
    f"aten::{name}{end}"
    for name in ("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "rrelu_with_noise",
                 "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "softplus", "hardshrink", "softshrink",
                 "threshold", "sigmoid", "hardsigmoid", "tanh", "log_sigmoid", "log_sigmoid_forward", "glu",
                 "_transformer_encoder_layer_fwd")
    for end in ("", "_")
}  # fmt: skip

# For a swap to the same function: the module of what a call computes.
_MODULES: list[tuple[Any, Any]] = [
    (F.relu, nn.ReLU), (F.gelu, nn.GELU), (F.silu, nn.SiLU), (F.relu6, nn.ReLU6), (F.elu, nn.ELU),
    (F.leaky_relu, lambda: nn.LeakyReLU(0.2)), (F.mish, nn.Mish), (F.hardswish, nn.Hardswish),
    (torch.sigmoid, nn.Sigmoid), (torch.tanh, nn.Tanh), (F.hardsigmoid, nn.Hardsigmoid), (F.softplus, nn.Softplus),
]  # fmt: skip


class Marker(nn.Module):
    """Stands for an activation, runs none, and counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Marker.calls += 1
        return x + 0


@dataclass
class Row:
    """One architecture of the table."""

    library: str
    name: str
    ran: int
    swapped: int
    refused: int
    kept: int
    unexplained: int
    same: bool
    report: Any

    @property
    def complete(self) -> bool:
        return self.unexplained == 0


def run(model: nn.Module, call: Example) -> Any:
    """One evaluation forward, unfused."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return model(*call.args, **call.kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def count(model: nn.Module, call: Example) -> int:
    """Activation operations of one forward by the profiler; those inside another one are part of it."""
    with torch.autograd.profiler.profile(use_cpu=True, use_kineto=False) as profiler:
        run(model, call)
    total = 0
    for event in profiler.function_events or []:
        parent = event.cpu_parent
        if event.name in ACTIVATIONS and (parent is None or parent.name not in ACTIVATIONS):
            total += 1
    return total


def tensors(value: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors(v)]
    return []


def same_function_swap(model: nn.Module, call: Example) -> bool:
    """Whether the output is equal to the bit when every activation is exchanged for the same function."""
    prototypes: dict[tuple[type, str], nn.Module] = {}
    for module in model.modules():
        if family_of_class(type(module)) not in (None, "glu") and not list(module.parameters()):
            prototypes.setdefault((type(module), module.extra_repr()), module)
    olds: list[Any] = list(prototypes.values())
    news: list[Any] = []
    for prototype in olds:
        twin = copy.deepcopy(prototype)
        if hasattr(twin, "inplace"):
            twin.inplace = False
        news.append(twin)
    before = tensors(run(model, call))
    report = swap_activations(
        model, old=(*olds, *(o for o, _ in _MODULES)), new=(*news, *(n for _, n in _MODULES)),
        example=call.kwargs or call.args, optimizer=(),
    )  # fmt: skip
    after = tensors(run(model, call))
    report.undo()
    back = tensors(run(model, call))
    equal = [torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True)]
    restored = [torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, back, strict=True)]
    return all(equal) and all(restored)


def find_call(model: nn.Module, architecture: Architecture) -> Example:
    """The given example, or the first derived one that runs."""
    if architecture.example is not None:
        return as_example(architecture.example())
    for call in example_inputs(model):
        try:
            run(model, call)
        except Exception:
            continue
        return call
    raise RuntimeError(f"no input for {architecture.name} is known")


def measure(architecture: Architecture) -> Row:
    """One row of the table."""
    torch.manual_seed(0)
    model = architecture.build().eval()
    call = find_call(model, architecture)
    same = same_function_swap(model, call)
    ran = count(model, call)
    families = tuple(f for f in known_families() if not is_gate(f))
    report = swap_activations(model, old=families, new=Marker, example=call.kwargs or call.args, optimizer=())
    Marker.calls = 0
    remaining = count(model, call)
    swapped = sum(s.operations for s in report.swapped)
    refused, kept = (sum(r.operations for r in records) for records in (report.refused, report.kept))
    calls = sum(s.calls for s in report.swapped)
    unexplained = abs(ran - swapped - remaining) + abs(remaining - refused - kept) + abs(calls - Marker.calls)
    return Row(architecture.library, architecture.name, ran, swapped, refused, kept, unexplained, same, report)


def table(rows: list[Row]) -> str:
    """The rows as Markdown, with totals."""
    head = [
        "| library | model | ran | swapped | refused | kept (gates, GLU) | unexplained | same |",
        "|---|---|" + "---:|" * 5 + "---|",
    ]
    body = [
        f"| {r.library} | {r.name} | {r.ran} | {r.swapped} | {r.refused} | {r.kept} | {r.unexplained} | "
        f"{'yes' if r.same else 'NO'} |"
        for r in rows
    ]
    total = [sum(getattr(r, n) for r in rows) for n in ("ran", "swapped", "refused", "kept", "unexplained")]
    cells = " | ".join(str(t) for t in total)
    body.append(f"| | **{len(rows)} models** | {cells} | {sum(r.same for r in rows)} of {len(rows)} |")
    return "\n".join(head + body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the subset that the tests run")
    parser.add_argument("--only", nargs="*", help="names of architectures")
    parser.add_argument("--output", help="also write the table there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for architecture in architectures():
        if (options.quick and architecture.name not in QUICK) or (
            options.only and architecture.name not in options.only
        ):
            continue
        row = measure(architecture)
        rows.append(row)
        print(f"{row.library:12} {row.name:40} ran {row.ran:4} swapped {row.swapped:4} refused {row.refused:3} "
              f"kept {row.kept:3} unexplained {row.unexplained} same {row.same}", flush=True)  # fmt: skip
        for record in row.report.refused:
            print(f"    refused: {record.old} at {record.name or 'the model itself'}: {record.reason}", flush=True)
    text = table(rows)
    print("\n" + text)
    explained = sum(r.ran for r in rows) - sum(r.unexplained for r in rows)
    print(f"\nswapped or named: {100 * explained / max(1, sum(r.ran for r in rows)):.2f} % of "
          f"{sum(r.ran for r in rows)} activations that ran in {len(rows)} models")  # fmt: skip
    if options.output:
        Path(options.output).write_text(text + "\n")
    if not all(r.complete and r.same for r in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
