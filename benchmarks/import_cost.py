"""What ``import lightning_entropy`` costs beside ``import lightning.pytorch``, which every user pays anyway.

Fresh interpreters take turns, one of each kind a round, so that a machine whose speed drifts favours none; the ratio is
taken round by round. The promise is at most 10 % more than Lightning alone, also when the callback is used.

    python benchmarks/import_cost.py [--rounds 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BASELINE = "import lightning.pytorch"
KINDS = {
    "import lightning.pytorch": BASELINE,
    "import lightning_entropy": "import lightning_entropy",
    "... and lightning.pytorch": f"import lightning_entropy; {BASELINE}",
    "... and AttentionEntropyMaximization": "import lightning_entropy; lightning_entropy.AttentionEntropyMaximization",
}
LIMIT = 1.10


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measured(rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each kind of import, and the median of their ratios to that of Lightning, round by round."""
    for code in KINDS.values():  # once for the files to be in the page cache and compiled
        seconds(code)
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(rounds):
        for name, code in KINDS.items():
            times[name].append(seconds(code))
    base = times["import lightning.pytorch"]
    return times, {name: statistics.median(a / b for a, b in zip(values, base)) for name, values in times.items()}


def table_rows(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of ``python -m benchmarks``."""
    times, ratios = measured(1 if quick else 9)
    peer = "import lightning.pytorch"
    return [
        {
            "method": "import",
            "quantity": name,
            "unit": "s",
            "ours": statistics.median(values),
            "peer_name": peer,
            "peer": statistics.median(times[peer]),
            "ratio": ratios[name],
            "target": LIMIT,
        }
        for name, values in times.items()
        if name != peer
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    times, ratios = measured(arguments.rounds)
    print(f"{platform.platform()}, Python {platform.python_version()}, {arguments.rounds} rounds\n")
    print("| in a fresh interpreter | median s | spread s | of lightning.pytorch |")
    print("|---|---|---|---|")
    for name, values in times.items():
        spread = max(values) - min(values)
        print(f"| {name} | {statistics.median(values):.2f} | {spread:.2f} | {ratios[name]:.3f} |")
    met = max(ratios.values()) <= LIMIT
    print(f"\nat most {LIMIT:.2f}: {'met' if met else 'NOT met'}")
    if arguments.json is not None:
        record = {"seconds": times, "ratios": ratios, "python": platform.python_version(), "met": met}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
