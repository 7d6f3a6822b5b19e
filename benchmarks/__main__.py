"""All cost benchmarks by one command: a table per method and a JSON, with the machine they were measured on.

Every benchmark runs in a process of its own and gives rows: ours beside the plain step or a peer that was measured in
the same run, their ratio (below 1 ours needs less) and the target where there is one. Losses are printed beside wins.
A benchmark that fails, or that lacks a package, is a line with its reason; the others are run.

    python -m benchmarks [--quick] [--only NAME ...] [--json FILE] [--write docs/cost.md]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "step_cost",
    "aem_overhead",
    "entropy_monitor_overhead",
    "attention_entropy",
    "activations",
    "bas_step",
    "diagnosis",
    "spectra",
    "wsol_metrics",
    "bag_loading",
    "import_cost",
)
KEYS = ("method", "quantity", "unit", "ours", "peer_name", "peer", "ratio", "target")
PACKAGES = ("lightning-entropy", "torch", "torchvision", "lightning", "timm", "transformers", "peft", "numpy", "h5py")
BEGIN, END = "<!-- begin of python -m benchmarks -->", "<!-- end of python -m benchmarks -->"


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    model = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        names = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": found,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def one(name: str, target: Path, *, quick: bool) -> None:
    """Run one benchmark in this process and write its rows."""
    sys.path.insert(0, str(ROOT / "benchmarks"))  # where a script that is run by itself finds its neighbours
    rows = importlib.import_module(f"benchmarks.{name}").table_rows(quick=quick)
    for row in rows:
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise ValueError(f"benchmarks.{name} gave a row without {missing}: {row}")
    target.write_text(json.dumps(rows), encoding="utf-8")


def run(name: str, *, quick: bool) -> dict[str, Any]:
    """One benchmark in a process of its own."""
    begin, load = time.perf_counter(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.json"
        arguments = [sys.executable, "-m", "benchmarks", "--run-one", name, str(target)]
        done = subprocess.run([*arguments, *(["--quick"] if quick else [])], cwd=ROOT, capture_output=True, text=True)
        rows = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else []
    failed = None
    if done.returncode:
        failed = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"name": name, "seconds": time.perf_counter() - begin, "load": load, "failed": failed, "rows": rows}


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def verdict(row: dict[str, Any], *, quick: bool) -> str:
    if quick or row["target"] is None or row["ratio"] is None:
        return ""
    return f"<= {number(row['target'])}: {'met' if row['ratio'] <= row['target'] else 'NOT met'}"


def table(results: list[dict[str, Any]], about: dict[str, Any], *, quick: bool) -> str:
    """Markdown: a table per method."""
    lines = [
        f"Measured {about['date']} on {about['cpu']}, {about['cores']} cores, {about['system']}, Python "
        f"{about['python']}, OMP_NUM_THREADS {about['threads'] or 'unset'}; "
        + ", ".join(f"{name} {version}" for name, version in about["packages"].items())
        + "."
    ]
    if quick:
        lines.append("\n**Quick mode: sizes at which the command is tried, and no figures to cite.**")
    loads = [r["load"] for r in results if r["load"] is not None]
    if loads:
        lines.append(
            f"\nLoad at the start of each benchmark: {min(loads):.1f} to {max(loads):.1f}. Above the number of cores, "
            "times of the wall say little and ratios more."
        )
    methods: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        for row in result["rows"]:
            methods.setdefault(row["method"], []).append(row)
    for method, rows in methods.items():
        lines += [f"\n## {method}\n", "| quantity | unit | ours | beside | it | ratio | target |"]
        lines.append("|---|---|---:|---|---:|---:|---|")
        for row in rows:
            cells = [row["quantity"], row["unit"], number(row["ours"]), row["peer_name"], number(row["peer"])]
            lines.append("| " + " | ".join([*cells, number(row["ratio"]), verdict(row, quick=quick)]) + " |")
    failed = [f"- `{r['name']}`: {r['failed']}" for r in results if r["failed"]]
    if failed:
        lines += ["\n## Not measured\n", *failed]
    return "\n".join(lines) + "\n"


def write(page: Path, text: str) -> None:
    """Put the table between its marks in a page, or make the page."""
    old = page.read_text(encoding="utf-8") if page.is_file() else f"# What it costs\n\n{BEGIN}\n{END}\n"
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} lacks the lines {BEGIN!r} and {END!r} between which the table goes")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether all of it runs, in minutes")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into a page (docs/cost.md)")
    parser.add_argument("--run-one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_one:
        one(options.run_one[0], Path(options.run_one[1]), quick=options.quick)
        return 0
    about = machine()
    results = []
    for name in options.only or NAMES:
        results.append(run(name, quick=options.quick))
        state = results[-1]["failed"] or f"{len(results[-1]['rows'])} rows"
        print(f"{name}: {state} ({results[-1]['seconds']:.0f} s)", file=sys.stderr, flush=True)
    text = table(results, about, quick=options.quick)
    print(text)
    if options.json:
        record = {"machine": about, "quick": options.quick, "benchmarks": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.write:
        write(options.write, text)
    return 1 if any(result["failed"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
