"""What is read of each transformer, by which path, how exactly and at what cost; the table of docs/observe.md.

Each model of tests/observe/model_cases.py (small, random weights) runs with and without a reader in turn, forward and
backward of its output and of the sum of its entropies; the error is against the library's own eager maps in float64.
The models are tiny, so the cost is mostly that of Python; benchmarks/attention_entropy.py has the cost at length.

    python benchmarks/observed_models.py [--repeats 20] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lightning_entropy.observe import AttentionEntropyReader  # noqa: E402
from tests.observe.model_cases import EVERY, ModelCase, of_map  # noqa: E402

PAGE = ROOT / "docs" / "observe.md"
BEGIN, END = "<!-- models: written by benchmarks/observed_models.py -->", "<!-- end of models -->"


def output_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def seconds(model: nn.Module, arguments: dict[str, Any], reader: AttentionEntropyReader | None) -> float:
    model.zero_grad()
    start = time.perf_counter()
    if reader is not None:
        reader.start()
    loss = output_of(model(**arguments)).sum()
    if reader is not None:
        reader.stop()
        loss = loss + torch.stack([layer.entropy.sum() for layer in reader.layers]).sum()
    loss.backward()
    return time.perf_counter() - start


def row(case: ModelCase, mode: str, repeats: int) -> str:
    model, arguments = case.build(mode)
    with torch.no_grad():
        maps = case.maps(model, arguments)
        with AttentionEntropyReader(model) as once:
            model(**arguments)
    error = max(
        float((layer.entropy.double().reshape(-1) - of_map(p).reshape(-1)).abs().max())
        for layer, p in zip(once.layers, maps)
    )
    reader = AttentionEntropyReader(model)
    reader.attach()
    for _ in range(2):
        seconds(model, arguments, None)
        seconds(model, arguments, reader)
    ratios = [seconds(model, arguments, reader) / seconds(model, arguments, None) for _ in range(repeats)]
    reader.detach()
    sources = " + ".join(dict.fromkeys(layer.source.replace("_", " ") for layer in once.layers))
    heads = sorted({layer.entropy.shape[-2] for layer in once.layers})
    read = f"{len(once.layers)} layers x {', '.join(map(str, heads))} heads"
    return (
        f"| {case.library} | `{case.name}` | {mode} | {read} | {sources} | {error:.0e} | "
        f"{statistics.median(ratios):.2f} | {case.note} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| library | model | mode | read | path | largest error (nats) | time of a step x plain | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, mode in EVERY:
        lines.append(row(case, mode, options.repeats))
        print(lines[-1], flush=True)
    if options.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")
        print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
