"""Synthetic slides in every file layout, for the benchmark of loading."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAYOUTS = ("pt", "npy", "npz", "h5", "h5_rows", "h5_chunks", "h5_gzip", "h5_gzip_converted")
DESCRIPTIONS = {
    "pt": "CLAM .pt",
    "npy": ".npy",
    "npz": ".npz, stored",
    "h5": ".h5, contiguous",
    "h5_rows": ".h5, a chunk a row (CLAM)",
    "h5_chunks": ".h5, h5py's own chunks",
    "h5_gzip": ".h5, gzip",
    "h5_gzip_converted": "the same after convert_bags",
}


def write_slides(folder: Path, *, layout: str, slides: int, size: int, width: int) -> None:
    """Random float16 slides; values repeat (64 levels) so that gzip has something to do."""
    import h5py
    import numpy as np
    import torch

    folder.mkdir()
    rng = np.random.default_rng(0)
    chunks: dict[str, Any] = {
        "h5": {},
        "h5_rows": {"chunks": (1, width)},
        "h5_chunks": {"chunks": True},
        "h5_gzip": {"compression": "gzip", "compression_opts": 1},
    }
    levels = rng.standard_normal(64).astype(np.float16)
    for number in range(slides):
        features = levels[rng.integers(0, 64, (size, width), dtype=np.uint8)]
        path = folder / f"s{number:04d}"
        if layout == "pt":
            torch.save(torch.from_numpy(features), path.with_suffix(".pt"))
        elif layout == "npy":
            np.save(path.with_suffix(".npy"), features)
        elif layout == "npz":
            np.savez(path.with_suffix(".npz"), features=features)
        else:
            with h5py.File(path.with_suffix(".h5"), "w") as file:
                file.create_dataset("features", data=features, **chunks[layout])
                file.create_dataset("coords", data=np.zeros((size, 2), dtype=np.int64))
    table = "".join(f"s{n:04d},{n % 2},train\n" for n in range(slides))
    (folder / "slides.csv").write_text("slide,label,split\n" + table, encoding="utf-8")


def make(layout: str, folder: Path, **shape: int) -> Iterator[Path]:
    """Make a layout, give its folder, and remove it."""
    from lightning_entropy.data import convert_bags

    if layout == "h5_gzip_converted":
        source = folder / "source"
        write_slides(source, layout="h5_gzip", **shape)
        begin = time.perf_counter()
        convert_bags(source, folder / layout)
        print(
            f"  convert_bags: {shape['slides'] / (time.perf_counter() - begin):.1f} slides a second",
            flush=True,
        )
        shutil.copy(source / "slides.csv", folder / layout)
        shutil.rmtree(source)
    else:
        write_slides(folder / layout, layout=layout, **shape)
    yield folder / layout
    shutil.rmtree(folder / layout)
