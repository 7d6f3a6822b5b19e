"""Small folders of feature files in every layout, for the tests of this room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

LAYOUTS = ("pt", "h5", "stamp", "aem", "npz", "npy")


def arrays(count: int = 6, *, width: int = 8, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Features (float16-exact float32) and coordinates of some slides of unlike sizes."""
    rng = np.random.default_rng(seed)
    slides = {}
    for number in range(count):
        size = 5 + 3 * number
        features = rng.normal(size=(size, width)).astype(np.float16).astype(np.float32)
        slides[f"s{number}"] = (features, rng.integers(0, 1000, (size, 2)))
    return slides


def write(folder: Path, layout: str, slides: dict[str, tuple[np.ndarray, np.ndarray]], **h5: Any) -> Path:
    """Write slides in a layout; returns what to pass as ``features``."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "aem":
        with h5py.File(folder / "all.h5", "w") as file:
            for number, (name, (features, coords)) in enumerate(slides.items()):
                group = file.create_group(name)
                group.create_dataset("feat", data=features, **h5)
                group.create_dataset("coords", data=coords)
                group.attrs["label"] = number % 2
        return folder / "all.h5"
    for name, (features, coords) in slides.items():
        if layout == "pt":
            torch.save(torch.from_numpy(features), folder / f"{name}.pt")
        elif layout == "npz":
            np.savez(folder / f"{name}.npz", features=features, coords=coords)
        elif layout == "npy":
            np.save(folder / f"{name}.npy", features)
            np.save(folder / f"{name}.coords.npy", coords)
        else:
            with h5py.File(folder / f"{name}.h5", "w") as file:
                file.create_dataset("features" if layout == "h5" else "feats", data=features, **h5)
                file.create_dataset("coords", data=coords if layout == "h5" else coords.astype(np.float64) + 0.25)
    return folder


def table(path: Path, slides: list[str], *, header: str = "slide,label", rows: list[str] | None = None) -> Path:
    """Write a table; without ``rows`` the labels alternate."""
    lines = rows if rows is not None else [f"{slide},{number % 2}" for number, slide in enumerate(slides)]
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path
