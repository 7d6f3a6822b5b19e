"""Attention maps as files that other tools open: GeoJSON for QuPath, h5 in TRIDENT's layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_entropy.extras import require
from lightning_entropy.recipes.attention_figure import COLORMAPS, Scale, color_limits
from lightning_entropy.recipes.attention_raster import log_ratio
from lightning_entropy.training.figures import write_figure
from lightning_entropy.training.files import atomic_write

if TYPE_CHECKING:
    from lightning_entropy.recipes.attention_map import AttentionMap

__all__ = ["plain", "read_h5", "write_figure", "write_geojson", "write_h5"]

OBJECT_TYPES = ("detection", "annotation", "tile")
# Names of the classes in QuPath, by the attention's multiple of the uniform share 1/N.
_CLASSES = (
    (0.5, "attention < 0.5x uniform"),
    (2.0, "attention 0.5x to 2x uniform"),
    (np.inf, "attention > 2x uniform"),
)


def plain(value: Any) -> Any:
    """A value of an h5 attribute as JSON takes it."""
    if isinstance(value, np.ndarray):
        return [plain(entry) for entry in value.tolist()]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


def write_geojson(
    one: AttentionMap,
    path: str | os.PathLike[str],
    *,
    object_type: str = "detection",
    scale: Scale = "log",
    top: int | None = None,
    origin: tuple[int, int] = (0, 0),
) -> Path:
    """Write a FeatureCollection (RFC 7946) with one square polygon a tile; see `AttentionMap.to_geojson`.

    Each feature has QuPath's properties ``objectType``, ``classification`` (below, about or above the uniform
    share), ``color`` (of the scale) and ``measurements`` (``attention`` and ``log(aN)``, where attention of 0
    counts as 1.2e-38). Rings are closed and run from the upper left corner along x first.

    Raises:
        ValueError: if ``object_type`` or ``scale`` is unknown, or ``top`` is not positive.
    """
    from matplotlib import colormaps

    if object_type not in OBJECT_TYPES:
        raise ValueError(f"object_type must be one of {', '.join(OBJECT_TYPES)}, got {object_type!r}")
    if top is not None and top < 1:
        raise ValueError(f"top must be at least 1 or None, got {top}")
    low, high = color_limits([one], scale)
    ratio = log_ratio(one.attention, len(one))
    shown = ratio if scale == "log" else one.attention.astype(np.float64)
    colors = colormaps[COLORMAPS[scale]](np.clip((shown - low) / (high - low), 0.0, 1.0), bytes=True)[:, :3]
    order = np.argsort(-one.attention, kind="stable")[:top]
    features = []
    for row in order.tolist() if top is not None else range(len(one)):
        left, upper = int(one.coords[row, 0]) - origin[0], int(one.coords[row, 1]) - origin[1]
        right, lower = left + one.patch_size_level0, upper + one.patch_size_level0
        name = next(name for bound, name in _CLASSES if ratio[row] <= np.log(bound))
        features.append(
            {
                "type": "Feature",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[left, upper], [right, upper], [right, lower], [left, lower], [left, upper]]],
                },
                "properties": {
                    "objectType": object_type,
                    "classification": {"name": name},
                    "color": colors[row].tolist(),
                    "measurements": {"attention": float(one.attention[row]), "log(aN)": float(ratio[row])},
                },
            }
        )
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump({"type": "FeatureCollection", "features": features}, file, allow_nan=False)
    return Path(path)


def write_h5(one: AttentionMap, path: str | os.PathLike[str]) -> Path:
    """Write TRIDENT's layout; see `AttentionMap.to_h5`.

    ``coords`` (N, 2) int64 carries the attributes of the features file and ``patch_size_level0``;
    ``attention`` (N,) float32 carries ``is_prob`` (True: after the softmax), ``branch`` and, where it is
    known, ``weight`` (of the entropy term) and ``checkpoint``. ``slide`` is an attribute of the file.
    """
    h5py = require("h5py", extra="mil")
    with atomic_write(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["slide"] = one.slide
        attention = file.create_dataset("attention", data=one.attention)
        attention.attrs["is_prob"] = True
        attention.attrs["branch"] = one.branch
        coords = file.create_dataset("coords", data=one.coords)
        for name, value in one.attributes.items():
            if value is not None:
                (attention if name in ("weight", "checkpoint") else coords).attrs[name] = value
        coords.attrs["patch_size_level0"] = one.patch_size_level0
    return Path(path)


def read_h5(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_h5` wrote, as the arguments of `AttentionMap`.

    Raises:
        ValueError: if a dataset or the patch size is missing.
    """
    h5py = require("h5py", extra="mil")
    with h5py.File(path, "r") as file:
        absent = [name for name in ("attention", "coords") if name not in file]
        if absent:
            raise ValueError(f"{path} has no dataset {', '.join(absent)}; it has {', '.join(file) or 'none'}")
        found = dict(file["coords"].attrs)
        if "patch_size_level0" not in found:
            raise ValueError(f"{path}: coords have no attribute patch_size_level0, only {sorted(found)}")
        of_attention = dict(file["attention"].attrs)
        found.update({name: of_attention[name] for name in ("weight", "checkpoint") if name in of_attention})
        return {
            "attention": file["attention"][:],
            "coords": file["coords"][:],
            "patch_size_level0": int(found.pop("patch_size_level0")),
            "slide": str(file.attrs.get("slide", "")),
            "branch": str(of_attention.get("branch", "mean")),
            "attributes": found,
        }
