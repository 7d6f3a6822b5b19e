"""Sampling instances of slide bags: ``SlideBags`` against reading whole files, for each file layout.

All sides give a model the same: a batch of one bag with float32 features of ``--instances`` rows drawn from a slide,
through a ``DataLoader`` without workers.

- CLAM: the dataset reads the whole file, ``collate_fn`` concatenates the bags of the batch, then rows are sampled.
- whole: the kindest form of it: rows are sampled right after the file was read, nothing is copied twice.
- SlideBags: reads the rows.

Each figure is that of the second epoch, in processes of their own, the sides in turn. "warm": the files are in the
page cache, as where a set fits into memory. "cold": the files were dropped from it before the pass (``posix_fadvise``,
Linux only; the host of a virtual disk may still hold them). Memory is the largest growth of the resident set while
bags are read one after the other, file pages that are mapped included; at the given size and at four times that.

    python benchmarks/bag_loading.py                           # 200 slides of 10,000 x 1,024: 4 GB of disk at a time
    python benchmarks/bag_loading.py --slides 12 --size 2000   # a minute or two
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from slide_files import DESCRIPTIONS, LAYOUTS, make

SIDES = ("CLAM", "whole", "SlideBags")


def whole_file_loader(folder: Path, *, instances: int, clam: bool) -> Any:
    """A loader that reads whole files and then samples rows.

    Args:
        folder: of the files.
        instances: rows to sample.
        clam: hand the whole bag over and concatenate it in ``collate_fn``, as CLAM does, and sample after that; else
            sample where the file is read.
    """
    import h5py
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    paths = sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".h5", ".npy", ".npz"))

    def sample(features: Any) -> Any:
        rows = torch.randperm(len(features))[:instances].sort().values
        return features[rows].float()

    class WholeFiles(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> Any:
            path = paths[index]
            if path.suffix == ".pt":
                features = torch.load(path, weights_only=True)
            elif path.suffix == ".npy":
                features = torch.from_numpy(np.load(path))
            elif path.suffix == ".npz":
                features = torch.from_numpy(np.load(path)["features"])
            else:
                with h5py.File(path, "r") as file:
                    features = torch.from_numpy(file["features"][:])
                    file["coords"][:]
            return (features if clam else sample(features)), index % 2

    def collate(items: Any) -> Any:
        features = torch.cat([item[0] for item in items])
        return (sample(features) if clam else features)[None], torch.tensor([item[1] for item in items])

    return DataLoader(WholeFiles(), batch_size=1, shuffle=True, collate_fn=collate)


def slide_bags_loader(folder: Path, *, instances: int) -> Any:
    """The loader that a Trainer gets from ``SlideBags``."""
    from lightning_entropy import set_verbosity
    from lightning_entropy.data import SlideBags

    set_verbosity("error")
    bags = SlideBags(str(folder), str(folder / "slides.csv"), val_fraction=0, max_instances=instances, check="headers")
    bags.setup("fit")
    return bags.train_dataloader()


def evict(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident() -> int:
    """Bytes of this process in memory now (Linux), or its largest ever (elsewhere)."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(folder: Path, *, side: str, instances: int, cold: bool) -> dict[str, float]:
    """One pass over all bags in this process: bags a second, and growth of the resident set."""
    import torch

    torch.set_num_threads(1)
    if side == "SlideBags":
        loader = slide_bags_loader(folder, instances=instances)
    else:
        loader = whole_file_loader(folder, instances=instances, clam=side == "CLAM")
    epoch = getattr(loader.sampler, "set_epoch", lambda _: None)
    for _ in loader:  # the first epoch: imports, the allocator, where the chunks of each file lie, and the page cache
        pass
    if cold:
        evict(folder)
    epoch(1)
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            peak[0] = max(peak[0], resident())

    begin = time.perf_counter()
    count = sum(1 for _ in loader)
    seconds = time.perf_counter() - begin
    epoch(2)
    watcher = threading.Thread(target=watch)  # in a pass of its own: watching takes time
    watcher.start()
    for step, _ in enumerate(loader):
        if step == 40:
            break
    done.set()
    watcher.join()
    return {"bags_per_second": count / seconds, "growth": max(0, peak[0] - before) / 2**20}


def in_process(folder: Path, *, side: str, instances: int, cold: bool) -> dict[str, float]:
    """The same in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--measure",
        side,
        "--folder",
        str(folder),
        "--instances",
        str(instances),
    ]
    answer = subprocess.run([*command, *(["--cold"] if cold else [])], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"measuring {side} in {folder} failed:\n{answer.stderr[-2000:]}")
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def machine() -> str:
    """What the figures were measured on."""
    import h5py
    import numpy
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line),
            cpu,
        )
    return (
        f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {numpy.__version__}, h5py {h5py.__version__}, "
        f"HDF5 {h5py.version.hdf5_version}"
    )


def spread(values: list[float]) -> str:
    """Median, with the smallest and the largest."""
    return f"{statistics.median(values):7.0f} [{min(values):.0f}, {max(values):.0f}]"


def measure_layout(layout: str, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one layout."""
    result: dict[str, Any] = {"layout": layout, "memory": {side: [] for side in SIDES}}
    states = ("warm", "cold") if hasattr(os, "posix_fadvise") else ("warm",)
    shape = {"slides": arguments.slides, "size": arguments.size, "width": arguments.width}
    for folder in make(layout, scratch, **shape):
        for state in states:
            result[state] = {side: [] for side in SIDES}
            growth = dict.fromkeys(SIDES, 0.0)
            for _ in range(arguments.repeats):
                for side in SIDES:
                    one = in_process(folder, side=side, instances=arguments.instances, cold=state == "cold")
                    result[state][side].append(one["bags_per_second"])
                    growth[side] = max(growth[side], one["growth"])
            if state == "warm":
                for side in SIDES:
                    result["memory"][side].append(growth[side])
    for folder in make(layout, scratch, slides=10, size=4 * arguments.size, width=arguments.width):
        for side in SIDES:
            one = in_process(folder, side=side, instances=arguments.instances, cold=False)
            result["memory"][side].append(one["growth"])
    return result


def report(result: dict[str, Any]) -> None:
    """Print one layout: a line for each state and side, with the ratio of SlideBags to it."""
    print(f"\n{DESCRIPTIONS[result['layout']]}")
    for state in ("warm", "cold"):
        for side in SIDES if state in result else ():
            rates, ours = result[state][side], result[state]["SlideBags"]
            ratios = [a / b for a, b in zip(ours, rates)]
            against = f"SlideBags {statistics.median(ratios):5.1f} x [{min(ratios):.1f}, {max(ratios):.1f}]"
            small, large = result["memory"][side]
            memory = f"   memory {small:4.0f} -> {large:4.0f}" if state == "warm" else ""
            print(
                f"  {state}  {side:9s} {spread(rates)}   {against if side != 'SlideBags' else ' ' * 24}{memory}",
                flush=True,
            )


def table_rows(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of ``python -m benchmarks``."""
    small = ["--slides=8", "--size=200", "--width=16", "--instances=32", "--repeats=1", "--layouts", "h5"]
    options = options_of(small if quick else ["--layouts", "pt", "h5", "h5_rows", "h5_gzip"])
    rows = []
    for layout in options.layouts:
        with tempfile.TemporaryDirectory(prefix="bag_loading_") as scratch:
            result = measure_layout(layout, Path(scratch), options)
        warm = result["warm"]
        for side in SIDES:
            if side == "SlideBags":
                continue
            both = {"method": "SlideBags", "peer_name": side}
            times = [1000 / statistics.median(warm[name]) for name in ("SlideBags", side)]
            of = f"{DESCRIPTIONS[layout]}, {options.instances} of {options.size:,} x {options.width:,}"
            ratio = statistics.median(b / a for a, b in zip(warm["SlideBags"], warm[side]))
            time_of = {"quantity": f"a bag, {of}", "unit": "ms", "ours": times[0], "peer": times[1], "ratio": ratio}
            rows.append({**both, **time_of, "target": None})
            grown = [result["memory"][name][-1] for name in ("SlideBags", side)]
            sizes = {"ours": grown[0], "peer": grown[1], "ratio": grown[0] / grown[1] if grown[1] > 0 else None}
            rows.append({**both, "quantity": f"memory at four times the size, {of}", "unit": "MiB", **sizes})
            rows[-1]["target"] = None
    return rows


def options_of(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--size", type=int, default=10_000, help="instances of a slide")
    parser.add_argument("--width", type=int, default=1_024)
    parser.add_argument("--instances", type=int, default=1_024, help="sampled of each slide")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    arguments = options_of()
    if arguments.measure:
        print(
            json.dumps(
                measure(
                    arguments.folder,
                    side=arguments.measure,
                    instances=arguments.instances,
                    cold=arguments.cold,
                )
            )
        )
        return
    print(machine())
    print(f"{arguments.slides} slides of {arguments.size} x {arguments.width} float16, {arguments.instances} sampled")
    print("bags a second: median [smallest, largest]; memory: MiB, at this size of slides -> at four times that")
    results = []
    for layout in arguments.layouts:
        with tempfile.TemporaryDirectory(prefix="bag_loading_") as scratch:
            results.append(measure_layout(layout, Path(scratch), arguments))
        report(results[-1])
    if arguments.json:
        from lightning_entropy.training.files import atomic_write

        with atomic_write(arguments.json) as part:
            part.write_text(json.dumps({"machine": machine(), "results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
